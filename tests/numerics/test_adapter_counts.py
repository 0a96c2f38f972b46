"""How many parameters each method trains: formulas in the docstrings, models on meta tensors, and what `plan` reckons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.lib.models.adapters.attaching import attach, count_trained
from stages.lib.models.adapters.counting import Counted
from stages.lib.models.adapters.methods import METHODS, count_ahead
from stages.lib.models.adapters.params import AdapterBlock, AdapterParams, method_name

GLM = {
    "model_type": "gpt_neox",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "vocab_size": 150528,
    "tie_word_embeddings": True,
}
"""The shape of ChatGLM-6B: a fused query-key-value, biases everywhere, the vocabulary's table counted once."""
GLM_PARAMETERS = 6_255_206_400

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
"""Queries of 32, keys and values of 2 x 8 = 16."""
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_local_experts": 4,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama with biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**LLAMA, "model_type": "mistral"},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    "gpt_neox": {**{k: v for k, v in LLAMA.items() if "key_value" not in k}, "model_type": "gpt_neox"},
    "gpt_neox, tied": {**GLM, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 100},
}
BLOCKS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 8},
    {"method": "lora", "rank": 4, "use_dora": True, "use_rslora": True},
    {"method": "lora", "rank": 2, "init": "orthogonal"},
    {"method": "lora", "rank": 2, "init": "pissa", "init_iterations": 2},
    {"method": "adalora", "rank": 6, "target_rank": 2},
    {"method": "vera", "rank": 6},
    {"method": "ia3"},
    {"method": "bottleneck", "size": 5},
    {"method": "prompt_tuning", "num_virtual_tokens": 7, "init": "random"},
    {"method": "prefix_tuning", "num_virtual_tokens": 7},
    {"method": "prefix_tuning", "num_virtual_tokens": 7, "projection": True},
    {"method": "prefix_tuning", "num_virtual_tokens": 7, "projection": True, "projection_size": 24},
    {"method": "p_tuning", "num_virtual_tokens": 7},
    {"method": "p_tuning", "num_virtual_tokens": 7, "encoder_size": 12},
    {"method": "p_tuning", "num_virtual_tokens": 7, "encoder": "lstm", "encoder_size": 12},
    {"method": "p_tuning", "num_virtual_tokens": 7, "encoder": "lstm", "encoder_layers": 3},
    {"method": "bitfit"},
    {"method": "freeze", "last_layers": 2},
    {"method": "freeze", "last_layers": 9},
]


def block_of(fields: dict[str, Any]) -> AdapterBlock:
    block: AdapterBlock = TypeAdapter(AdapterParams).validate_python(fields)
    return block


def on_meta(architecture: dict[str, Any], fields: dict[str, Any], auto_class: Any = AutoModelForCausalLM) -> Counted:
    """What is trained, and what of it is new, of a model whose tensors have shapes only."""
    config = AutoConfig.for_model(**{**architecture, "bos_token_id": 0, "eos_token_id": 1})
    with torch.device("meta"):
        model = auto_class.from_config(config)
        before = sum(parameter.numel() for parameter in model.parameters())
        adapted = attach(model, block_of(fields), seed=3)
    # Of an adalora peft keeps the first rank of each layer as a parameter that is never trained or saved.
    whole = sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".ranknum." not in name)
    return Counted(count_trained(adapted), whole - before)


def test_the_shape_of_chatglm() -> None:
    """Table once 150,528 x 4,096; a layer 4,096 x (12,288 + 4,096) + 2 x 4,096 x 16,384 and biases and norms of
    12,288 + 4,096 + 16,384 + 4,096 + 4 x 4,096; twice 4,096 at the end.
    """
    layer = 4096 * (12288 + 4096) + 2 * 4096 * 16384 + 12288 + 4096 + 16384 + 4096 + 4 * 4096
    assert 150528 * 4096 + 28 * layer + 2 * 4096 == GLM_PARAMETERS
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GLM))
    assert sum(parameter.numel() for parameter in model.parameters()) == GLM_PARAMETERS


def test_prefix_tuning_with_projection_on_chatglm() -> None:
    """256 x 4,096 + (4,096^2 + 4,096) + (4,096 x 28 x 2 x 4,096 + 28 x 2 x 4,096) = 957,583,360: 13.276% of the whole."""
    expected = 256 * 4096 + (4096**2 + 4096) + (4096 * 28 * 2 * 4096 + 28 * 2 * 4096)
    fields = {"method": "prefix_tuning", "num_virtual_tokens": 256, "projection": True}
    assert on_meta(GLM, fields) == (expected, expected) == (957_583_360, 957_583_360)
    assert count_ahead(block_of(fields), GLM) == (expected, expected)
    assert f"{expected / (GLM_PARAMETERS + expected):.3%}" == "13.276%"


def test_lora_on_chatglm() -> None:
    """r = 8 on the fused query-key-value: 28 x 8 x (4,096 + 12,288) = 3,670,016, 0.059% of the whole."""
    expected = 28 * 8 * (4096 + 12288)
    fields = {"method": "lora", "rank": 8, "target_modules": ["query_key_value"]}
    assert on_meta(GLM, fields) == (expected, expected) == (3_670_016, 3_670_016)
    assert count_ahead(block_of(fields), GLM) == (expected, expected)
    assert f"{expected / (GLM_PARAMETERS + expected):.3%}" == "0.059%"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # r (inputs + outputs): q, o 32 + 32; k, v 32 + 16; gate, up, down 32 + 80.
        ({"method": "lora", "rank": 8}, 3 * 8 * (2 * 64 + 2 * 48 + 3 * 112)),
        ({"method": "lora", "rank": 8, "target_modules": ["q_proj", "mlp.down_proj"]}, 3 * 8 * (64 + 112)),
        # DoRA: a norm for each output, q 32 and v 16.
        ({"method": "lora", "rank": 2, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}, 3 * (2 * 112 + 48)),
        # Beginning with singular values or not, r (inputs + outputs).
        ({"method": "lora", "rank": 8, "init": "pissa", "target_modules": ["q_proj"]}, 3 * 8 * 64),
        # A rank of their own: v 6, up 2 but for that of the first layer, 1.
        (
            {
                "method": "lora",
                "rank": 4,
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "rank_pattern": {"v_proj": 6, r"layers\.0\..*up_proj": 1, "mlp.up_proj": 2},
            },
            3 * (4 * 64 + 6 * 48) + (1 + 2 + 2) * 112,
        ),
        # r (inputs + outputs + 1), with the r of the beginning: q 65, v 49.
        ({"method": "adalora", "rank": 6, "target_rank": 2, "target_modules": ["q_proj", "v_proj"]}, 3 * 6 * (65 + 49)),
        # Outputs + r: q, o 32; k, v 16; gate, up 80; down 32.
        ({"method": "vera", "rank": 6}, 3 * (2 * 38 + 2 * 22 + 2 * 86 + 38)),
        ({"method": "vera", "rank": 6, "target_modules": ["v_proj"]}, 3 * 22),
        # Outputs of k and v, inputs of down.
        ({"method": "ia3"}, 3 * (16 + 16 + 80)),
        # 2 h m + m + h, at attention and MLP, or at the MLP alone.
        ({"method": "bottleneck", "size": 5}, 3 * 2 * (2 * 32 * 5 + 5 + 32)),
        ({"method": "bottleneck", "size": 5, "placement": "parallel", "modules": ["mlp"]}, 3 * (2 * 32 * 5 + 5 + 32)),
        # p h.
        ({"method": "prompt_tuning", "num_virtual_tokens": 7}, 7 * 32),
        # p 2 L k.
        ({"method": "prefix_tuning", "num_virtual_tokens": 7}, 7 * 2 * 3 * 16),
        # p k + (k k + k) + (k 2 L k + 2 L k).
        (
            {"method": "prefix_tuning", "num_virtual_tokens": 7, "projection": True},
            7 * 16 + (16 * 16 + 16) + (16 * 2 * 3 * 16 + 2 * 3 * 16),
        ),
        # p h + (h m + m) + (m m + m) + (m h + h).
        (
            {"method": "p_tuning", "num_virtual_tokens": 7, "encoder_size": 12},
            7 * 32 + (32 * 12 + 12) + (12 * 12 + 12) + (12 * 32 + 32),
        ),
        # p h + both ways 4 m (h + m) + 8 m, then 4 m (2 m + m) + 8 m; 2 m x 2 m + 2 m; 2 m h + h.
        (
            {"method": "p_tuning", "num_virtual_tokens": 7, "encoder": "lstm", "encoder_size": 12},
            7 * 32 + 2 * (48 * 44 + 96) + 2 * (48 * 36 + 96) + (24 * 24 + 24) + (24 * 32 + 32),
        ),
        # A layer: q, o 32 x 32, k, v 32 x 16, three of 32 x 80, two norms.
        ({"method": "freeze", "last_layers": 1}, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80 + 2 * 32),
        ({"method": "freeze", "last_layers": 2, "modules": ["mlp"]}, 2 * 3 * 32 * 80),
        ({"method": "freeze", "modules": ["lm_head", "layers.0.self_attn.o_proj"]}, 100 * 32 + 32 * 32),
    ],
)
def test_formulas(fields: dict[str, Any], expected: int) -> None:
    """Of a Llama of 3 layers (L), hidden 32 (h), keys 16 (k), inner 80, 100 tokens. The formula stands above each case."""
    assert on_meta(LLAMA, fields).trained == expected


def test_experts() -> None:
    """Each of E = 4 experts r (inputs + outputs), of its fused gate and up 32 x 2 48 and its down 48 x 32, in each of 2
    layers, alone, or beside r (inputs + outputs) of q 32 x 32. Where no layers are named, peft names the experts by itself:
    the two that are fused have twice the rank together, and the router 32 x 4 and q, o 32 x 32 and k, v 32 x 16 have r.
    """
    experts = {"method": "lora", "rank": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    up, down = 4 * 2 * (32 + 96), 4 * 2 * (48 + 32)
    alone = 2 * (up + down)
    assert on_meta(MIXTRAL, {**experts, "target_modules": []}) == (alone, alone)
    assert on_meta(MIXTRAL, {**experts, "target_modules": ["q_proj"]}).trained == alone + 2 * 2 * 64
    layer = 2 * up + down + 2 * (32 + 4) + 2 * (2 * 64 + 2 * 48)
    assert on_meta(MIXTRAL, {"method": "lora", "rank": 2}).trained == 2 * layer


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [({"v_proj": 6}, 3 * (8 * (2 * 64 + 48 + 3 * 112) + 6 * 48)), ({"layers.0.self_attn.v_proj": 6}, None)],
)
def test_plan_reckons_ranks_of_their_own(patterns: dict[str, int], expected: int | None) -> None:
    """Rank 8, but of v 6, whose inputs and outputs are 32 + 16; what names one layer is not reckoned."""
    fields = {"method": "lora", "rank": 8, "rank_pattern": patterns}
    reckoned = count_ahead(block_of(fields), LLAMA)
    assert (reckoned.trained if reckoned else None) == expected
    assert reckoned in (None, on_meta(LLAMA, fields))


def test_new_layers() -> None:
    """Two layers that were added among three: twice what a layer has, q, o 32 x 32, k, v 32 x 16, three of 32 x 80, two norms."""
    expected = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80 + 2 * 32)
    architecture, fields = {**LLAMA, "added_layers": [0, 2]}, {"method": "freeze", "only_new": True}
    assert on_meta(architecture, fields) == count_ahead(block_of(fields), architecture) == (expected, 0)
    head = {**LLAMA, "num_labels": 1, "pad_token_id": 0}
    assert on_meta(head, fields, AutoModelForSequenceClassification).trained == 32


def test_biases() -> None:
    """GPT-2: a layer 3 h + h + 4 h + h of its linear layers and 2 h of its norms, and h of the last norm: h = 32, 3 layers."""
    assert on_meta(ARCHITECTURES["gpt2"], {"method": "bitfit"}) == (3 * 11 * 32 + 32, 0)


@pytest.mark.parametrize("fields", BLOCKS, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_reckons_what_is_trained(name: str, fields: dict[str, Any]) -> None:
    architecture = ARCHITECTURES[name]
    reckoned = count_ahead(block_of(fields), architecture)
    if fields["method"] == "bitfit" and name in ("llama", "mistral", "qwen3"):
        assert reckoned == (0, 0), "there are no biases"
    else:
        assert reckoned == on_meta(architecture, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lora", "target_modules": r".*\.[qv]_proj"},
        {"method": "lora", "target_modules": ["lm_head"]},
        {"method": "lora", "modules_to_save": ["lm_head"]},
        {"method": "freeze", "modules": ["mlp"]},
    ],
    ids=str,
)
def test_what_is_not_known_beforehand_is_not_guessed(fields: dict[str, Any]) -> None:
    assert count_ahead(block_of(fields), LLAMA) is None
    assert count_ahead(block_of({"method": "lora"}), {**LLAMA, "model_type": "olmo2"}) is None


def test_a_new_head_is_trained_by_every_method() -> None:
    """A score of h = 32 beside r (32 + 32) in each of 3 layers, and beside the last layer."""
    one = {"num_labels": 1, "pad_token_id": 0}
    score = 32
    lora = {"method": "lora", "rank": 2, "target_modules": ["q_proj"]}
    assert on_meta({**LLAMA, **one}, lora, AutoModelForSequenceClassification).trained == 3 * 2 * 64 + score
    freeze = {"method": "freeze", "last_layers": 1, "modules": ["mlp"]}
    assert on_meta({**LLAMA, **one}, freeze, AutoModelForSequenceClassification).trained == 3 * 32 * 80 + score


def test_every_method_is_counted_here() -> None:
    """But for an adapter that is continued, which is counted once it is there."""
    assert {fields["method"] for fields in BLOCKS} == {method_name(params) for params in METHODS} - {"continued"}
