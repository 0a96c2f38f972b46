"""What models of some families cannot do, so that `plan` says it. Tests try tiny models of those that are much in use, and
print what works into `stages/MODELS.md`; the others stand here by what their classes have in common with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem

MIXING = frozenset(
    (
        *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "rwkv", "recurrent_gemma", "xlstm"),
        *("lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "nemotron_h", "granitemoehybrid"),
        *("opt", "falcon", "bloom", "gpt_oss"),
    )
)
"""Families in which a document changes what the model makes of the next one in its block: a state goes through all tokens, or
places are counted from the mask."""

WITHOUT_ATTENTION = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
"""Families whose models take no attention mask for each token's place, so that no score can be read off a padded chat."""

UNQUANTIZABLE = {
    **dict.fromkeys(("gpt2",), "whose layers are of a class that llm-compressor does not quantize"),
    **dict.fromkeys(("mixtral", "gpt_oss"), "whose experts are one tensor, which llm-compressor does not quantize"),
    **dict.fromkeys(("mamba2",), "whose layers llm-compressor does not quantize"),
    **dict.fromkeys(("falcon",), "whose output layer llm-compressor does not save apart from its embeddings"),
}
"""Family -> why llm-compressor 0.14 makes no model of it."""


WITHOUT_SDPA = frozenset(
    (
        *("deberta", "deberta-v2", "mpnet", "rembert", "roformer", "convbert", "big_bird", "fnet", "nystromformer"),
        *(
            "longformer",
            "funnel",
            "xlnet",
            "mega",
            "ibert",
            "squeezebert",
            "mobilebert",
            "canine",
            "reformer",
            "yoso",
            "mra",
        ),
    )
)
"""Encoder families whose attention takes no mask for each pair of tokens."""

WITHOUT_READER = {
    **dict.fromkeys(
        ("eurobert", "nomic_bert", "jina_embeddings_v3"), "for which transformers has no question answering head"
    ),
    **dict.fromkeys(("longformer",), "whose question answering head wants three separators in every row"),
}
"""Family -> why no reader is made of it."""


def mixing_problems(architecture: Mapping[str, Any], isolate_documents: bool) -> list[Problem]:
    """Of training on packed blocks, where the family is known not to keep their documents apart."""
    kind = architecture.get("model_type")
    if not isolate_documents or kind not in MIXING | WITHOUT_SDPA:
        return []
    what = f"is true, and models of the type {kind} do not keep the documents of a block apart"
    hint = "Set isolate_documents: false, or choose another model_type (llama, qwen3, gpt2 and gpt_neox can)."
    return [Problem("params.isolate_documents", what, hint)]


def scoring_problems(architecture: Mapping[str, Any], where: str = "inputs.model") -> list[Problem]:
    """Of a reward model, where the family has no place for its head."""
    kind = architecture.get("model_type")
    if kind not in WITHOUT_ATTENTION:
        return []
    what = f"is a {kind} model, off whose padded chats no score can be read"
    return [Problem(where, what, "Choose another architecture (llama, mistral and qwen3 work).")]


def adapter_problems(
    architecture: Mapping[str, Any],
    target_modules: list[str] | str | None,
    where: str = "params.adapter.target_modules",
) -> list[Problem]:
    """Of an adapter on all linear layers, where peft refuses some of the family's."""
    kind = architecture.get("model_type")
    if target_modules is not None or kind not in ("mamba", "mamba2", "falcon_mamba"):
        return []
    what = f"is null, and peft adapts not all linear layers of {kind} models"
    return [Problem(where, what, "Name them: [in_proj, x_proj] for mamba, [in_proj] for mamba2.")]


def reading_problems(architecture: Mapping[str, Any]) -> list[Problem]:
    """Of a reader, where the family has no head that reads."""
    kind = architecture.get("model_type")
    if kind not in WITHOUT_READER:
        return []
    what = f"is a {kind} model, {WITHOUT_READER[kind]}"
    return [Problem("inputs.encoder", what, "Choose another architecture (bert, roberta and modernbert work).")]


def quantization_problems(architecture: Mapping[str, Any]) -> list[Problem]:
    kind = architecture.get("model_type")
    if kind not in UNQUANTIZABLE:
        return []
    what = f"is a {kind} model, {UNQUANTIZABLE[kind]}"
    return [Problem("inputs.model", what, "Choose another architecture (llama, mistral and qwen3 work).")]
