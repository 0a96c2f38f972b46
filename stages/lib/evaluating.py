"""Sums of measures over held-out rows, spread over the processes of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.distributed import all_reduce_sum, any_process
from stages.lib.scheduling import Collate, Tensors

Metrics = dict[str, float]

Measure = Callable[[torch.nn.Module, Tensors], Mapping[str, torch.Tensor]]
"""One forward pass on held-out rows -> named sums over the batch."""


class StopRequested(Exception):
    """Ends an evaluation early, in all processes at once."""


class Evaluator:
    """Sums measures over held-out rows, spread over the processes. Works within the DeepSpeed engine."""

    def __init__(self, model: torch.nn.Module, ctx: Context, device: torch.device, batch_size: int) -> None:
        self.model = model
        self.ctx = ctx
        self.device = device
        self.batch_size = batch_size

    def sums(
        self, rows: Sequence[dict[str, Any]], collate: Collate, measure: Measure, batch_size: int | None = None
    ) -> Metrics:
        """Each of `measure`'s values summed over all `rows`, the same number in every process.

        All processes run the same number of forward passes, because ZeRO-3 gathers weights together: one that has no
        batch left repeats the first, and does not count it.
        """
        if not len(rows):
            raise DataError(
                Problem("held-out rows", "there are none to measure on", "Keep some back in the mix stage.")
            )
        size = batch_size or self.batch_size
        batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        world = self.ctx.world
        totals: dict[str, float] = {}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(batches), world.size):
                    if any_process(self.ctx.stop_requested()):
                        raise StopRequested
                    mine = first + world.rank
                    indices = batches[mine] if mine < len(batches) else batches[0]
                    batch = collate([{**rows[index], "position": index} for index in indices])
                    batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                    weight = 1.0 if mine < len(batches) else 0.0
                    for name, value in measure(self.model, batch).items():
                        # Not added when the weight is 0: a repeated batch counts for nothing, whatever its value.
                        totals[name] = totals.get(name, 0.0) + (float(value.double()) if weight else 0.0)
        finally:
            self.model.train(training)
        names = sorted(totals)
        return dict(zip(names, all_reduce_sum([totals[name] for name in names]), strict=True))

    def forward(self, compute: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
        """`compute(model)` in evaluation mode and without gradients, the same in every process."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return compute(self.model)
        finally:
            self.model.train(training)
