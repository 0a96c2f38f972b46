"""The linear layers and biases in a layer of the causal architectures that are known here. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stages.lib.models.arithmetic import completed, odd_fields


class Linear(NamedTuple):
    """A linear layer, by its path in a layer of the model."""

    path: str
    inputs: int
    outputs: int
    bias: bool


def layer_linears(architecture: Mapping[str, Any]) -> list[Linear] | None:
    """The linear layers in each layer of a causal model; None for families that are not written here."""
    config = completed(architecture)
    if config is None or odd_fields(architecture) or config.get("add_cross_attention"):
        return None
    family = str(config["model_type"])
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        return llama_linears(config)
    if family == "gpt2":
        return gpt2_linears(config)
    return neox_linears(config) if family == "gpt_neox" else None


WITHOUT_TORCHS_LINEARS = frozenset({"gpt2", "openai-gpt"})
"""Model types whose layers are linear in a class of transformers' own (Conv1D)."""


def llama_linears(c: Mapping[str, Any]) -> list[Linear]:
    hidden, heads, inner = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
    head_dim = c.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (c["num_key_value_heads"] or heads) * head_dim
    bias = bool(c.get("attention_bias", False))
    of_queries = True if c["model_type"] == "qwen2" else bias
    mlp = bool(c.get("mlp_bias", False))
    return [
        Linear("self_attn.q_proj", hidden, queries, of_queries),
        Linear("self_attn.k_proj", hidden, keys, of_queries),
        Linear("self_attn.v_proj", hidden, keys, of_queries),
        Linear("self_attn.o_proj", queries, hidden, bias and c["model_type"] != "qwen2"),
        Linear("mlp.gate_proj", hidden, inner, mlp),
        Linear("mlp.up_proj", hidden, inner, mlp),
        Linear("mlp.down_proj", inner, hidden, mlp),
    ]


def gpt2_linears(c: Mapping[str, Any]) -> list[Linear]:
    hidden = c["n_embd"]
    inner = c["n_inner"] or 4 * hidden
    return [
        Linear("attn.c_attn", hidden, 3 * hidden, True),
        Linear("attn.c_proj", hidden, hidden, True),
        Linear("mlp.c_fc", hidden, inner, True),
        Linear("mlp.c_proj", inner, hidden, True),
    ]


def neox_linears(c: Mapping[str, Any]) -> list[Linear]:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c["attention_bias"])
    return [
        Linear("attention.query_key_value", hidden, 3 * hidden, bias),
        Linear("attention.dense", hidden, hidden, bias),
        Linear("mlp.dense_h_to_4h", hidden, inner, True),
        Linear("mlp.dense_4h_to_h", inner, hidden, True),
    ]


def layer_biases(architecture: Mapping[str, Any]) -> int | None:
    """How many numbers the biases of a layer are, with those of its norms."""
    linears, config = layer_linears(architecture), completed(architecture)
    if linears is None or config is None:
        return None
    norms = 2 * norm_bias(config)
    return norms + sum(each.outputs for each in linears if each.bias)


def other_biases(architecture: Mapping[str, Any]) -> int | None:
    """How many numbers the biases are that stand in no layer: that of the last norm."""
    config = completed(architecture)
    return norm_bias(config) if config is not None and layer_linears(architecture) is not None else None


def norm_bias(config: Mapping[str, Any]) -> int:
    """The width of a norm's bias; 0 where norms have none."""
    return {"gpt2": config.get("n_embd"), "gpt_neox": config.get("hidden_size")}.get(str(config["model_type"])) or 0
