"""Rows that count differently for each head of an ensemble.

N: rows, H: heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.lib.formulas.token_losses import Tensors
from stages.lib.text.batches import Collate

OF_BOOTSTRAP = 0xB007
"""What tells these random numbers from others of the same seed."""


class WeightedRows(Sequence[dict[str, Any]]):
    """Rows, each with what it counts for each head, as `head_weights`."""

    def __init__(self, rows: Sequence[dict[str, Any]], weight_NH: NDArray[np.float32]) -> None:
        self.rows = rows
        self.weight_NH = weight_NH

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {**self.rows[index], "head_weights": self.weight_NH[index]}


def bootstrap_weights(seed: int, num_rows: int, heads: int) -> NDArray[np.float32]:
    """N x H: how often each row is in each head's sample, drawn from Poisson(1): a function of (seed, row, head) and nothing else.

    The bootstrap's counts as N grows (Oza and Russell, 2001, online bagging); their mean is 1, so that no head learns faster.
    """
    drawn = [
        np.random.Generator(np.random.PCG64([seed, OF_BOOTSTRAP, head])).poisson(1.0, num_rows) for head in range(heads)
    ]
    return np.stack(drawn, axis=1).astype(np.float32)


def collate_weighted(collate: Collate) -> Collate:
    """`collate`, and `weight_NH` where the rows have `head_weights`."""

    def collate_with_weights(rows: list[dict[str, Any]]) -> Tensors:
        batch = collate(rows)
        if "head_weights" in rows[0]:
            batch["weight_NH"] = torch.from_numpy(np.stack([row["head_weights"] for row in rows]))
        return batch

    return collate_with_weights


def mean_over_heads(loss_NH: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """N, or N and whatever follows the heads: the mean over heads of a loss, each row as often as it is in the head's sample."""
    weight_NH = batch.get("weight_NH")
    if weight_NH is not None:
        loss_NH = loss_NH * weight_NH.reshape(*weight_NH.shape, *([1] * (loss_NH.dim() - 2)))
    return loss_NH.mean(dim=1)
