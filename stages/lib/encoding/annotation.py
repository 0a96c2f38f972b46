"""What is said of a row by a published model, and what every sort of model is asked. Found things are kept as JSON, so that a run
that was stopped goes on after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.training.evaluating import Metrics

DIGITS = 6


Found = dict[str, Any]
"""What was found in one row, and its `score`, from 0 to 1."""
Measured = tuple[Metrics, dict[str, Any]]
"""Metrics, and the figures behind them."""


class Annotator(Protocol):
    """One sort of model, ready to read rows. `Item` is a row as it reads it."""

    auto_class: Any

    def read(self, row: Row) -> Any:
        """The row in tokens."""

    def num_windows(self, item: Any) -> int:
        """How many sequences the item is."""

    def num_tokens(self, item: Any) -> int:
        """Tokens of the longest of them."""

    def is_cut(self, item: Any) -> bool:
        """Whether the model does not see all of it."""

    def collate(self, items: Sequence[Any]) -> Tensors:
        """The items as what the model is called with."""

    def find(self, model: torch.nn.Module, batch: Tensors, items: Sequence[Any]) -> list[Found]:
        """What the model says of each item."""

    def annotate(self, row: Row, found: Found) -> Row:
        """The row with what was found in place of what it said."""

    def summary(self, found: Sequence[Found]) -> Metrics:
        """How often what was found."""

    def is_known(self, row: Row) -> bool:
        """Whether the row says what is to be found."""

    def measure(self, rows: Sequence[Row], found: Sequence[Found], training: Sequence[Row], seed: int) -> Measured:
        """How what was found compares with what the rows, which are all known, say; beside what `training` alone teaches."""
