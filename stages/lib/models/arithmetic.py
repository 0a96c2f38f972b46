"""How large a model is, from its config alone. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COMMON_FIELDS = frozenset(
    {"pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "use_cache", "tie_word_embeddings"}
)
"""Fields that every family's config has."""


@dataclass(frozen=True)
class Family:
    """Architectures of one `model_type`: the fields that decide their size, with transformers' defaults, and the others."""

    defaults: Mapping[str, Any]
    others: str
    count: Callable[[Mapping[str, Any]], int]
    """The parameters of the model with its language-model head, tied weights counted once."""
    causal: bool = True
    """Whether it predicts the next token; otherwise the masked ones."""

    @property
    def fields(self) -> frozenset[str]:
        return COMMON_FIELDS | set(self.defaults) | set(self.others.split())


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def head_of(c: Mapping[str, Any], hidden: int) -> int:
    return 0 if c["tie_word_embeddings"] else c["vocab_size"] * hidden


def count_llama(
    c: Mapping[str, Any], *, qkv_bias: bool = False, out_bias: bool = False, head_norms: bool = False
) -> int:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (c["num_key_value_heads"] or heads) * head_dim
    attention = (
        linear(hidden, queries, qkv_bias) + 2 * linear(hidden, keys, qkv_bias) + linear(queries, hidden, out_bias)
    )
    mlp_bias = c.get("mlp_bias", False)
    mlp = 2 * linear(hidden, c["intermediate_size"], mlp_bias) + linear(c["intermediate_size"], hidden, mlp_bias)
    layer = attention + mlp + 2 * hidden + (2 * head_dim if head_norms else 0)
    return c["vocab_size"] * hidden + c["num_hidden_layers"] * layer + hidden + head_of(c, hidden)


def count_gpt2(c: Mapping[str, Any]) -> int:
    hidden = c["n_embd"]
    inner = c["n_inner"] or 4 * hidden
    layer = (
        4 * hidden + linear(hidden, 3 * hidden) + linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden)
    )
    return (c["vocab_size"] + c["n_positions"]) * hidden + c["n_layer"] * layer + 2 * hidden + head_of(c, hidden)


def count_gpt_neox(c: Mapping[str, Any]) -> int:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], c["attention_bias"]
    layer = 4 * hidden + linear(hidden, 3 * hidden, bias) + linear(hidden, hidden, bias)
    layer += linear(hidden, inner) + linear(inner, hidden)
    return c["vocab_size"] * hidden + c["num_hidden_layers"] * layer + 2 * hidden + head_of(c, hidden)


def count_bert(c: Mapping[str, Any]) -> int:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    embeddings = (c["vocab_size"] + c["max_position_embeddings"] + c["type_vocab_size"]) * hidden + 2 * hidden
    layer = 4 * linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden) + 4 * hidden
    # Untied, the output layer has a bias of its own beside the head's.
    biases = c["vocab_size"] * (1 if c["tie_word_embeddings"] else 2)
    head = linear(hidden, hidden) + 2 * hidden + biases + head_of(c, hidden)
    return embeddings + c["num_hidden_layers"] * layer + head


def count_distilbert(c: Mapping[str, Any]) -> int:
    hidden, inner = c["dim"], c["hidden_dim"]
    embeddings = (c["vocab_size"] + c["max_position_embeddings"]) * hidden + 2 * hidden
    layer = 4 * linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden) + 4 * hidden
    head = linear(hidden, hidden) + 2 * hidden + c["vocab_size"] + head_of(c, hidden)
    return embeddings + c["n_layers"] * layer + head


def count_modernbert(c: Mapping[str, Any]) -> int:
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    norm = hidden * (2 if c["norm_bias"] else 1)
    attention = linear(hidden, 3 * hidden, c["attention_bias"]) + linear(hidden, hidden, c["attention_bias"])
    mlp = linear(hidden, 2 * inner, c["mlp_bias"]) + linear(inner, hidden, c["mlp_bias"])
    # The first layer's attention has no norm before it: the embeddings have just been normalized.
    body = c["vocab_size"] * hidden + norm + layers * (attention + mlp + 2 * norm) - norm + norm
    head = (
        linear(hidden, hidden, c["classifier_bias"]) + norm + c["vocab_size"] * c["decoder_bias"] + head_of(c, hidden)
    )
    return body + head


LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


QWEN = {
    **LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}


ROTARY = "hidden_act rms_norm_eps rope_parameters attention_dropout"


WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"


BERT_OTHERS = "hidden_act hidden_dropout_prob attention_probs_dropout_prob layer_norm_eps classifier_dropout is_decoder add_cross_attention"


FAMILIES: dict[str, Family] = {
    "llama": Family(
        {**LLAMA, "attention_bias": False, "mlp_bias": False},
        f"{ROTARY} pretraining_tp",
        lambda c: count_llama(c, qkv_bias=c["attention_bias"], out_bias=c["attention_bias"]),
    ),
    "mistral": Family(
        {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        f"{ROTARY} sliding_window",
        count_llama,
    ),
    "qwen2": Family(
        {name: value for name, value in QWEN.items() if name != "head_dim"},
        f"{ROTARY} {WINDOWS}",
        lambda c: count_llama(c, qkv_bias=True),
    ),
    "qwen3": Family(
        {**QWEN, "head_dim": 128, "attention_bias": False},
        f"{ROTARY} {WINDOWS}",
        lambda c: count_llama(c, qkv_bias=c["attention_bias"], out_bias=c["attention_bias"], head_norms=True),
    ),
    "gpt2": Family(
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "tie_word_embeddings": True,
        },
        "activation_function resid_pdrop embd_pdrop attn_pdrop layer_norm_epsilon summary_type summary_use_proj summary_activation"
        " summary_proj_to_labels summary_first_dropout scale_attn_weights scale_attn_by_inverse_layer_idx"
        " reorder_and_upcast_attn add_cross_attention",
        count_gpt2,
    ),
    "gpt_neox": Family(
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "max_position_embeddings": 2048,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        "hidden_act attention_dropout hidden_dropout classifier_dropout layer_norm_eps use_parallel_residual rope_parameters is_decoder",
        count_gpt_neox,
    ),
    "bert": Family(BERT, BERT_OTHERS, count_bert, causal=False),
    "roberta": Family({**BERT, "vocab_size": 50265}, BERT_OTHERS, count_bert, causal=False),
    "distilbert": Family(
        {
            "vocab_size": 30522,
            "dim": 768,
            "hidden_dim": 3072,
            "n_layers": 6,
            "n_heads": 12,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        "sinusoidal_pos_embds dropout attention_dropout activation qa_dropout seq_classif_dropout",
        count_distilbert,
        causal=False,
    ),
    "modernbert": Family(
        {
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
            "attention_bias": False,
            "mlp_bias": False,
            "norm_bias": False,
            "decoder_bias": True,
            "classifier_bias": False,
            "tie_word_embeddings": True,
        },
        "hidden_activation initializer_cutoff_factor norm_eps cls_token_id sep_token_id attention_dropout layer_types rope_parameters"
        " local_attention embedding_dropout mlp_dropout classifier_pooling classifier_dropout classifier_activation"
        " deterministic_flash_attn sparse_prediction sparse_pred_ignore_index",
        count_modernbert,
        causal=False,
    ),
}


SAME_FIELDS = {
    "hidden_size": ("n_embd", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions",),
}
"""Names that transformers takes for a field besides the family's own, both ways."""


def completed(architecture: Mapping[str, Any]) -> dict[str, Any] | None:
    """The architecture with the family's defaults and its own names of fields; None if the family is not known here."""
    family = FAMILIES.get(str(architecture.get("model_type")))
    if family is None:
        return None
    own = {}
    for name, value in architecture.items():
        names = [name, *SAME_FIELDS.get(name, ())]
        own[next((each for each in names if each in family.defaults), name)] = value
    return {**family.defaults, **own}


def odd_fields(architecture: Mapping[str, Any]) -> dict[str, str]:
    """Field -> what it must be, of the fields whose values no model of a family known here can have."""
    config = completed(architecture) or {}
    family = FAMILIES.get(str(architecture.get("model_type")))
    odd = {}
    for name, default in family.defaults.items() if family else ():
        value = config[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                odd[name] = "true or false"
        elif not ((value is None and default is None) or (type(value) is int and value > 0)):
            odd[name] = "a whole number above 0"
    return odd


def parameter_count(architecture: Mapping[str, Any]) -> int | None:
    """The parameters of the model with its language-model head; None for families whose arithmetic is not written here."""
    config = completed(architecture)
    if config is None or config.get("add_cross_attention") or config.get("is_decoder") or odd_fields(architecture):
        return None
    return FAMILIES[config["model_type"]].count(config)


def field_of(architecture: Mapping[str, Any], name: str) -> Any:
    """A field of the architecture by its usual name, e.g. `hidden_size`; None where it is not known."""
    config = completed(architecture) or architecture
    return next((config[each] for each in (name, *SAME_FIELDS.get(name, ())) if config.get(each) is not None), None)
