"""What encoder tasks share: padded batches, the call of the model, and what is published of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.store.artifact import Facts
from stages.lib.text.tokenizers import facts_of_tokenizer


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """The sequences as one tensor of B x T, filled up with `value` on the right."""
    width = max(map(len, sequences), default=0)
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences], dtype=torch.long)


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """What the model is called with, of B x T: `input_ids`, `attention_mask`, and `token_type_ids` if it knows them."""
    inputs = {
        "input_ids": pad(ids, tokenizer.pad_token_id or 0),
        "attention_mask": pad([[1] * len(each) for each in ids], 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = pad(type_ids, 0)
    return inputs


def call(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
    """The model's output for the part of the batch that `model_inputs` made."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: batch[name] for name in names if name in batch})


def facts_of(
    tokenizer: PreTrainedTokenizerBase, *, head_type: str, max_length_tokens: int, precision: str, **known: Any
) -> Facts:
    """What the consumers of an encoder task's model check."""
    of_tokenizer = facts_of_tokenizer(tokenizer)
    of_tokenizer.pop("stop_token_ids")  # where generation stops; nothing is generated here
    return Facts(**of_tokenizer, max_length_tokens=max_length_tokens, head_type=head_type, dtype=precision, **known)
