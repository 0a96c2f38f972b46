"""Tiny models with weights large enough for attention to matter, and what they say of one sequence alone: the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 40
PADDING = 3
FAMILIES: dict[str, dict[str, Any]] = {"llama": {"intermediate_size": 24}, "gpt2": {}}
"""Llama turns its positions, so that only distances count. GPT-2 learned each one, and was not told of padding."""


def tiny_policy(family: str, seed: int = 1) -> Any:
    from transformers import AutoModelForCausalLM

    return made(AutoModelForCausalLM, family, seed)


def tiny_value(family: str, seed: int = 2) -> Any:
    """A model with one score, whose head is not zero."""
    from transformers import AutoModelForSequenceClassification

    return made(AutoModelForSequenceClassification, family, seed, num_labels=1)


def made(auto_class: Any, family: str, seed: int, **more: Any) -> Any:
    from transformers import AutoConfig

    from stages.lib.models.loading import without_dropout

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    fields = {**sizes, "vocab_size": VOCABULARY, "pad_token_id": PADDING, **FAMILIES[family], **more}
    model = auto_class.from_config(AutoConfig.for_model(family, **fields), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return without_dropout(model).eval()


@torch.no_grad()
def logprobs_alone(model: Any, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) of every token of `ids` after `prompt`, from a forward pass without padding. K."""
    whole_1T = torch.tensor([[*prompt, *ids]])
    logits_KV = model(input_ids=whole_1T).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits_KV.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(list(ids))]


@torch.no_grad()
def values_alone(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The score of the state before every token of `ids`, from a forward pass without padding. K."""
    hidden_1TH = model.base_model(input_ids=torch.tensor([[*prompt, *ids]])).last_hidden_state
    return model.score(hidden_1TH)[0, len(prompt) - 1 : -1, 0]  # type: ignore[no-any-return]
