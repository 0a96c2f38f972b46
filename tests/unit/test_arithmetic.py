"""Parameter counts against transformers itself, memory against the arithmetic of the ZeRO paper."""

from __future__ import annotations

from typing import Any

import pytest

from stages.lib.models.arithmetic import FAMILIES, completed, field_of, parameter_count
from stages.lib.models.memory import memory_bytes_per_rank

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 24},
    "qwen2": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen3": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "gpt2": {"hidden_size": 48, "num_attention_heads": 4},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": 4, "attention_bias": False},
    "bert": {"hidden_size": 48, "num_attention_heads": 4, "type_vocab_size": 3},
    "roberta": {"hidden_size": 48, "num_attention_heads": 4},
    "distilbert": {"hidden_size": 48, "num_attention_heads": 4},
    "modernbert": {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "norm_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
    },
}


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("sizes", ["default", "small"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_counts_what_transformers_builds(model_type: str, sizes: str, tied: bool | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    block: dict[str, Any] = {"num_hidden_layers": 3, "vocab_size": 101, "pad_token_id": 3}
    if sizes == "small":
        inner = {"gpt2": "n_inner", "distilbert": "hidden_dim"}.get(model_type, "intermediate_size")
        block |= {inner: 72, "max_position_embeddings": 40, **SMALL[model_type]}
    if tied is not None:
        block["tie_word_embeddings"] = tied
    auto_class = AutoModelForCausalLM if FAMILIES[model_type].causal else AutoModelForMaskedLM
    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.for_model(model_type, **block))
    assert parameter_count({"model_type": model_type, **block}) == model.num_parameters()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_knows_every_field_of_the_config(model_type: str) -> None:
    """So that a field that is not known here is not known to transformers either."""
    import dataclasses

    from transformers import CONFIG_MAPPING, PreTrainedConfig

    config_class = CONFIG_MAPPING[model_type]
    own = {each.name for each in dataclasses.fields(config_class)} - {
        each.name for each in dataclasses.fields(PreTrainedConfig)
    }
    every = {each.name for each in dataclasses.fields(config_class)}
    assert own <= FAMILIES[model_type].fields
    assert FAMILIES[model_type].fields - {"use_cache"} <= every


def test_an_unknown_family_is_not_counted() -> None:
    assert parameter_count({"model_type": "mamba", "hidden_size": 8}) is None
    assert completed({"model_type": "mamba"}) is None
    assert field_of({"model_type": "mamba", "hidden_size": 8}, "hidden_size") == 8


def test_names_that_transformers_takes_for_each_other() -> None:
    block = {"model_type": "gpt2", "hidden_size": 48, "n_layer": 2}
    assert (completed(block) or {})["n_embd"] == 48
    assert field_of(block, "hidden_size") == 48
    assert field_of(block, "num_hidden_layers") == 2
    assert field_of(block, "max_position_embeddings") == 1024


def states(layout: dict[str, Any] | None, precision: str, parameters: int = 7_500_000_000) -> float:
    """GB of weights, gradients and optimizer on each of 64 processes, activations left out."""
    needed = memory_bytes_per_rank(
        parameters=parameters,
        layout=layout,
        world_size=64,
        precision=precision,
        micro_batch=0,
        sequence_length=1024,
        hidden=4096,
        layers=32,
        vocabulary=32000,
        gradient_checkpointing=False,
    )
    return needed / 1e9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_table_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. (2020), figure 1: 7.5 billion parameters, 64 processes, 16 bytes a parameter in mixed precision."""
    assert states({"zero_optimization": {"stage": stage}}, "bf16") == pytest.approx(gigabytes, abs=0.06)


def test_without_deepspeed() -> None:
    """float32: 4 + 4 + 8 bytes a parameter; under autocast 2 more for the copy."""
    assert states(None, "fp32") == pytest.approx(120.0)
    assert states(None, "bf16") == pytest.approx(135.0)


def test_offloaded_states_are_elsewhere() -> None:
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    # Only the gradients stay: 2 bytes a parameter, split over 64.
    assert states({"zero_optimization": offload}, "bf16") == pytest.approx(7.5 * 2 / 64)


def test_activations_and_logits() -> None:
    """2 rows of 8 tokens, hidden 4, 3 layers, vocabulary 5, bf16: 16 tokens.

    Activations 16 x 4 x 17 x 2 bytes x 3 layers = 6528; with checkpointing x (1 + 3/17) = 2560. Logits 16 x 5 x 10 = 800.
    """

    def needed(gradient_checkpointing: bool) -> int:
        return memory_bytes_per_rank(
            parameters=0,
            layout=None,
            world_size=1,
            precision="bf16",
            micro_batch=2,
            sequence_length=8,
            hidden=4,
            layers=3,
            vocabulary=5,
            gradient_checkpointing=gradient_checkpointing,
        )

    assert needed(False) == 6528 + 800
    assert needed(True) == 2560 + 800
