"""Measures over held-out rows, spread over the processes of a job: their sums, or the value of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.processes.collectives import all_reduce_sum, any_process, from_all
from stages.lib.text.batches import Collate

Metrics = dict[str, float]


Measure = Callable[[torch.nn.Module, Tensors], Mapping[str, torch.Tensor]]
"""One forward pass on held-out rows -> named sums over the batch, or for `Evaluator.values` named vectors, one value a row."""


UNTRAINED = (
    "Nothing was trained yet: look at the weights of the model that training begins with, and at the held-out rows."
)
"""What to do where the first measurement is no number."""


class StopRequested(Exception):
    """Ends an evaluation early, in all processes at once."""


class Evaluator:
    """Measures on held-out rows, spread over the processes. Works within the DeepSpeed engine."""

    def __init__(self, model: torch.nn.Module, ctx: Context, device: torch.device, batch_size: int) -> None:
        self.model = model
        self.ctx = ctx
        self.device = device
        self.batch_size = batch_size

    def sums(
        self, rows: Sequence[dict[str, Any]], collate: Collate, measure: Measure, batch_size: int | None = None
    ) -> Metrics:
        """Each of `measure`'s values summed over all `rows`, the same number in every process."""
        totals: Tensors = {}
        with self.measuring():
            for _, batch, counts in self.passes(rows, collate, batch_size or self.batch_size):
                for name, value in measure(self.model, batch).items():
                    # Not added where it does not count: a repeated batch is worth nothing, whatever its value.
                    counted = value.double() if counts else torch.zeros_like(value, dtype=torch.float64)
                    totals[name] = totals.get(name, 0.0) + counted
        names = sorted(totals)
        return dict(zip(names, all_reduce_sum([float(totals[name]) for name in names]), strict=True))

    def values(
        self, rows: Sequence[dict[str, Any]], collate: Collate, measure: Measure, batch_size: int | None = None
    ) -> Tensors:
        """Each of `measure`'s vectors over all `rows`, in their order, as float64 on the CPU, the same in every process."""
        mine: list[tuple[int, Tensors]] = []
        with self.measuring():
            for indices, batch, counts in self.passes(rows, collate, batch_size or self.batch_size):
                found = measure(self.model, batch)
                assert all(value.shape == (len(indices),) for value in found.values()), "one value a row"
                if counts:
                    mine.append((indices.start, {name: value.double().cpu() for name, value in found.items()}))
        batches = [each for part in from_all(mine) for each in part]
        batches.sort(key=lambda each: each[0])
        whole = {name: torch.cat([vectors[name] for _, vectors in batches]) for name in batches[0][1]}
        assert all(len(vector) == len(rows) for vector in whole.values()), "every row was measured once"
        return whole

    def passes(
        self, rows: Sequence[dict[str, Any]], collate: Collate, size: int
    ) -> Iterator[tuple[range, Tensors, bool]]:
        """(which rows, their batch, whether it counts) of each forward pass of this process.

        All processes run the same number of them, because ZeRO-3 gathers weights together: one that has no batch left
        repeats the first, which does not count. Raises `StopRequested`, and `DataError` if there are no rows.
        """
        if not len(rows):
            raise DataError(
                Problem("held-out rows", "there are none to measure on", "Keep some back in the mix stage.")
            )
        batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        world = self.ctx.world
        for first in range(0, len(batches), world.size):
            if any_process(self.ctx.stop_requested()):
                raise StopRequested
            mine = first + world.rank
            counts = mine < len(batches)
            indices = batches[mine] if counts else batches[0]
            batch = collate([{**rows[index], "position": index} for index in indices])
            yield indices, {name: tensor.to(self.device) for name, tensor in batch.items()}, counts

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model in evaluation mode and without gradients, and afterwards as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def forward(self, compute: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
        """`compute(model)` in evaluation mode and without gradients, the same in every process."""
        with self.measuring():
            return compute(self.model)
