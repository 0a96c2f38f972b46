"""How an encoder is called in all of its tasks: the batch that it reads, and the part of a batch that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stages.lib.text.batches import attention_mask, padded, padding_of


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """What the model is called with, of B x T: `input_ids`, `attention_mask`, and `token_type_ids` if it knows them."""
    inputs = {
        "input_ids": padded(ids, padding_of(tokenizer)),
        "attention_mask": attention_mask(ids),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = padded(type_ids)
    return inputs


def call(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
    """The model's output for the part of the batch that `model_inputs` made."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: batch[name] for name in names if name in batch})
