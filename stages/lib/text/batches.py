"""What a batch is: rows made into tensors, padded where they differ in length, each with its place in the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from stages.lib.formulas.token_losses import Tensors

Collate = Callable[[list[dict[str, Any]]], Tensors]
"""Rows -> tensors. Each row carries its `position` in the schedule (in evaluation: its index), for randomness that
must be a function of (seed, position). Must not draw from a global random generator."""


def padded(sequences: Sequence[Any], value: float = 0, dtype: DTypeLike = np.int64) -> torch.Tensor:
    """The sequences as one tensor, B x T and whatever each of their places holds, filled up with `value` on the right."""
    # Copied, because arrays that are mapped from a file cannot be written to, which torch would warn of.
    tensors = [torch.from_numpy(np.array(each, dtype=dtype)) for each in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def attention_mask(sequences: Sequence[Any]) -> torch.Tensor:
    """B x T: 1 for each place of the sequences, 0 where `padded` fills up. So position tells what padding is, never an id."""
    return padded([np.ones(len(each)) for each in sequences])


def with_positions(collate: Collate) -> Collate:
    """`collate`, and the rows' positions beside what it returns."""

    def collate_with_positions(rows: list[dict[str, Any]]) -> Tensors:
        return {**collate(rows), "positions": torch.tensor([row["position"] for row in rows])}

    return collate_with_positions


def num_tokens(batch: Tensors) -> float:
    """Tokens of a micro batch, without padding where a 2-dimensional attention mask tells."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return float(mask.sum())
    return float(batch["input_ids"].numel()) if "input_ids" in batch else 0.0


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with where masks tell what is padding: any would do."""
    return tokenizer.pad_token_id or 0
