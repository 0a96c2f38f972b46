"""A tiny model of each family that is much in use, and every stage that takes one: causal models with the template of their
kind, and encoders.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.running.estimates import architecture_of
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages import STAGES
from tests import rows
from tests.integration.preference_world import run
from tests.integration.test_real_templates import tokenizer_of
from tests.integration.tiny_language_model import as_pair, asked, make_tokenizer, said, write_split

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Family:
    """`template` is one of TRL's, "" for an encoder; `config` overrides `SMALL`."""

    model_type: str
    template: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


HEADS = {"head_dim": 8}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

FAMILIES: dict[str, Family] = {
    "Llama 3": Family("llama", "llama3_1"),
    "Mistral": Family("mistral", "qwen2_5"),
    "Ministral": Family("ministral", "qwen2_5", HEADS),
    "Mixtral": Family("mixtral", "qwen2_5", {"num_local_experts": 4}),
    "Qwen2.5": Family("qwen2", "qwen2_5"),
    "Qwen3": Family("qwen3", "qwen3", HEADS),
    "Qwen3 MoE": Family("qwen3_moe", "qwen3", {**HEADS, **EXPERTS, "num_experts": 4}),
    "Qwen3.5": Family(
        "qwen3_5_text",
        "qwen3_5_think",
        {
            **HEADS,
            **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Gemma": Family("gemma", "gemma", HEADS),
    "Gemma 2": Family("gemma2", "gemma", HEADS),
    "Gemma 3": Family("gemma3_text", "gemma3", HEADS),
    "Phi-2": Family("phi", "phi3"),
    "Phi-3, 3.5, 4": Family("phi3", "phi3"),
    "DeepSeek-V3": Family(
        "deepseek_v3",
        "deepseekv3",
        {
            **EXPERTS,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "gpt-oss": Family("gpt_oss", "gptoss", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4": Family("glm4", "glm4moe", HEADS),
    "GLM-4.5": Family(
        "glm4_moe",
        "glm4moe",
        {**HEADS, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "Command R": Family("cohere", "cohere"),
    "Command R7B": Family("cohere2", "cohere2"),
    "OLMo 2": Family("olmo2", "qwen2_5"),
    "Granite 3": Family("granite", "qwen2_5"),
    "SmolLM3": Family("smollm3", "qwen3"),
    "LFM2": Family("lfm2", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Nemotron": Family("nemotron", "llama3"),
    "EXAONE 4": Family("exaone4", "qwen2_5"),
    "StableLM": Family("stablelm", "qwen2_5"),
    "StarCoder 2": Family("starcoder2", "qwen2_5"),
    "GPT-2": Family("gpt2", "qwen2_5"),
    "Pythia": Family("gpt_neox", "qwen2_5"),
    "OPT": Family("opt", "qwen2_5", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Falcon": Family("falcon", "qwen2_5"),
    "BLOOM": Family("bloom", "qwen2_5"),
    "Mamba": Family("mamba", "qwen2_5", {"state_size": 8}),
    "Mamba 2": Family("mamba2", "qwen2_5", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
}


ENCODERS: dict[str, Family] = {
    "BERT": Family("bert"),
    "RoBERTa": Family("roberta"),
    "XLM-RoBERTa": Family("xlm-roberta"),
    "CamemBERT": Family("camembert"),
    "DistilBERT": Family("distilbert", config={"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "ELECTRA": Family("electra", config={"embedding_size": 32}),
    "ALBERT": Family("albert", config={"embedding_size": 32}),
    "ModernBERT": Family("modernbert"),
    "ERNIE": Family("ernie"),
    "EuroBERT": Family("eurobert"),
    "NomicBERT": Family("nomic_bert"),
    "DeBERTa": Family("deberta"),
    "DeBERTa v2, v3": Family("deberta-v2", config={"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "MPNet": Family("mpnet"),
    "RemBERT": Family("rembert", config={"input_embedding_size": 32, "output_embedding_size": 32}),
    "RoFormer": Family("roformer", config={"embedding_size": 32}),
    "ConvBERT": Family("convbert", config={"embedding_size": 32}),
    "BigBird": Family("big_bird", config={"attention_type": "original_full"}),
    "Longformer": Family("longformer", config={"attention_window": [16, 16]}),
    "FNet": Family("fnet"),
    "Nystromformer": Family("nystromformer"),
}


def make_model(family: Family, folder: Path) -> None:
    """A model of random weights and its tokenizer, as `save_pretrained` writes both; an encoder if it has no template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    tokenizer = tokenizer_of(family.template) if family.template else encoder_tokenizer()
    names = ["bos_token_id", "eos_token_id", "pad_token_id"]
    names += [] if family.template else ["cls_token_id", "sep_token_id"]
    ids = {name: getattr(tokenizer, name) for name in names}
    config = AutoConfig.for_model(family.model_type, vocab_size=len(tokenizer), **ids, **{**SMALL, **family.config})
    torch.manual_seed(0)
    (AutoModelForCausalLM if family.template else AutoModelForMaskedLM).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoder_tokenizer() -> Any:
    tokenizer = make_tokenizer([row["text"] for row in rows.requests(60)], vocabulary_size=600)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    return tokenizer


Data = dict[str, Path]
"""Folders of mixed rows."""


def make_data(folder: Path) -> Data:
    chats = [{"messages": [*asked(row), said(row["output"])]} for row in rows.exchanges(12)]
    pairs = [as_pair(row) for row in rows.preferences(12)]
    text = [{"text": text} for text in rows.texts(40)]
    requests = rows.requests(40)
    questions = [
        {
            "id": str(number),
            "context": f"The key number {number} lies under the mat near the door.",
            "question": "Where is the key?",
            "answers": [{"start": f"The key number {number} lies ".index("lies") + 5, "text": "under the mat"}],
        }
        for number in range(16)
    ]
    written = {
        "chats": chats,
        "preferences": pairs,
        "text": text,
        "labels": [{"text": row["text"], "label": row["label"]} for row in requests],
        "spans": [{"text": row["text"], "spans": row["spans"]} for row in requests],
        "questions": questions,
    }
    return {name: write_split(folder / name, split, heldout=len(split) // 3) for name, split in written.items()}


STEPS = {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
TUNING = {**STEPS, "max_length_tokens": 2000}
ROLLOUTS = {
    "rewards": [{"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}],
    "rollouts": 1,
    "rollout_batch_size": 4,
    "global_batch_size": 4,
    "epochs_per_rollout": 1,
    "max_prompt_tokens": 1900,
    "max_new_tokens": 4,
    "heldout_prompts": 2,
    "learning_rate": 1e-3,
}
STUDENT = {"architecture": {"model_type": "llama", **SMALL}}

Inputs = Mapping[str, str]

CELLS: dict[str, tuple[str, Inputs, Mapping[str, Any]]] = {
    "pack": ("pack", {"text": "text", "tokenizer": "model"}, {"sequence_length": 64}),
    "pretrain": ("pretrain", {"tokens": "pack", "model": "model"}, {**STEPS, "objective": "causal"}),
    "sft": ("sft", {"model": "model", "chats": "chats"}, TUNING),
    "reward": ("reward", {"model": "model", "preferences": "preferences"}, TUNING),
    "dpo": ("dpo", {"model": "model", "preferences": "preferences"}, TUNING),
    "kto": ("kto", {"model": "model", "preferences": "preferences"}, TUNING),
    "ppo": (
        "ppo",
        {"model": "model", "prompts": "chats", "reward": "reward"},
        {**ROLLOUTS, "rewards": [{"kind": "reward_model"}]},
    ),
    "grpo": ("grpo", {"model": "model", "prompts": "chats"}, ROLLOUTS),
    "grpo, lora": (
        "grpo",
        {"model": "model", "prompts": "chats"},
        {**ROLLOUTS, "adapter": {"method": "lora", "rank": 4}},
    ),
    "distill": ("distill", {"teacher": "model", "tokens": "pack"}, {**STEPS, **STUDENT}),
    "quantize": (
        "quantize",
        {"model": "model", "calibration": "pack"},
        {"method": "round_to_nearest", "bits": 8, "group_size": None, "heldout_rows": 4},
    ),
    "evaluate": (
        "evaluate",
        {"models.it": "model", "tokens": "pack", "chats": "chats", "preferences": "preferences"},
        {"heldout_blocks": 4},
    ),
}
"""Column -> stage, inputs (data, the model, or another column's artifact) and params."""


SHORT = {**STEPS, "max_length_tokens": 64}
WINDOWS = {**SHORT, "stride_tokens": 16}

ENCODER_CELLS: dict[str, tuple[str, Inputs, Mapping[str, Any]]] = {
    "pack": CELLS["pack"],
    "pretrain": ("pretrain", {"tokens": "pack", "model": "model"}, {**STEPS, "objective": "masked"}),
    "classify": ("classify", {"encoder": "model", "labels": "labels"}, SHORT),
    "extract": ("extract", {"encoder": "model", "spans": "spans"}, WINDOWS),
    "answer": ("answer", {"encoder": "model", "questions": "questions"}, {**WINDOWS, "max_question_tokens": 16}),
    "annotate": ("annotate", {"model": "classify", "rows": "labels"}, {}),
}


def cells_of(name: str, data: Data, folder: Path) -> dict[str, str]:
    """For each of the family's cells: "" where the stage runs on a model of it, else what `plan` says against it.

    What fails only when it runs is raised.
    """
    model = folder / "model"
    make_model({**FAMILIES, **ENCODERS}[name], model)
    places = {"model": model, **data}
    refused: dict[str, str] = {}
    for column, (kind, inputs, params) in (CELLS if name in FAMILIES else ENCODER_CELLS).items():
        needed = [each for each in inputs.values() if refused.get(each)]
        if needed:
            refused[column] = refused[needed[0]]
            continue
        given = {role: places[each] for role, each in inputs.items()}
        refused[column] = planned(kind, given, params)
        if not refused[column]:
            run(STAGES[kind], given, params, folder / column)
            places[column] = folder / column / "out"
    shutil.rmtree(folder)
    return refused


def planned(kind: str, inputs: Mapping[str, Path], params: Mapping[str, Any]) -> str:
    """What the stage's check, which `plan` asks, says of these inputs; "" if nothing."""
    stage = STAGES[kind]
    estimates = {role: Estimate(architecture=architecture_of(place)) for role, place in inputs.items()}
    forecast = Forecast(stage.params(**params), Resources(device="cpu", threads=1), estimates)
    return "; ".join(map(str, stage.check(forecast) if stage.check else []))
