"""What a batch is: rows made into tensors, each with its place in the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stages.lib.formulas.token_losses import Tensors

Collate = Callable[[list[dict[str, Any]]], Tensors]
"""Rows -> tensors. Each row carries its `position` in the schedule (in evaluation: its index), for randomness that
must be a function of (seed, position). Must not draw from a global random generator."""


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
