"""What a training that goes by its own measurements remembers of them, and what follows: in a checkpoint, so that a resume decides alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem, RecipeError
from stages.lib.training.evaluating import Metrics
from stages.lib.training.params import TrainingParams
from stages.lib.training.selection import best_step, gain, measured_in_vain

KEY = "watched"
"""Where the measurements stand in a checkpoint."""


@dataclass
class Watching:
    """The values of the metrics that the recipe names, and the two decisions that are functions of them.

    The model before the first step is no candidate: it is the one that training began with.
    """

    params: TrainingParams
    measured: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (optimizer step, value), in the order of the steps."""

    @classmethod
    def of(cls, params: TrainingParams, state: Mapping[str, Any] | None) -> Watching:
        """As it stands in a checkpoint, of metrics that are watched now; empty without one."""
        before = (state or {}).get(KEY, {})
        watching = cls(params)
        for name in watching.metrics:
            watching.measured[name] = [(int(step), float(value)) for step, value in before.get(name, [])]
        return watching

    @property
    def metrics(self) -> list[str]:
        named = [each.metric for each in (self.params.publish_best, self.params.stop_early) if each is not None]
        return list(dict.fromkeys(named))

    def note(self, step: int, metrics: Metrics) -> None:
        """Takes in what was measured at a step, once."""
        for name, measured in self.measured.items():
            if not measured or measured[-1][0] < step:
                measured.append((step, metrics[name]))

    @property
    def best(self) -> int | None:
        """The step that is to be published, as far as is known; None where that is the last one in any case."""
        best = self.params.publish_best
        return best_step(self.measured[best.metric], best.direction) if best is not None else None

    @property
    def waited(self) -> int:
        """How many measurements in a row were no improvement."""
        stop = self.params.stop_early
        if stop is None:
            return 0
        return measured_in_vain(self.measured[stop.metric], stop.direction, stop.least_improvement)

    @property
    def ends(self) -> bool:
        """Whether there is no use in going on."""
        stop = self.params.stop_early
        return stop is not None and self.waited >= stop.patience

    def needs_checkpoint(self, step: int) -> bool:
        """Whether the weights of a step that was just measured must be kept."""
        return self.best == step or self.ends

    def carried(self, step: int) -> dict[str, Any]:
        """Its part of the checkpoint of a step: what was measured, and which other checkpoint must stay beside it."""
        needs = [self.best] if self.best not in (None, step) else []
        return {KEY: self.measured, **({"needs": needs} if needs else {})} if self.measured else {}

    def why_it_ends(self) -> str:
        """Which rule of the recipe ended the training."""
        stop = self.params.stop_early
        assert stop is not None
        return f"{stop.metric} was no better in {self.waited} measurements in a row"

    def what_is_published(self, last_step: int, published: Metrics, before: Metrics) -> str:
        """Which weights are published, and why, beside those that are not."""
        best, watched = self.best, self.params.publish_best
        assert best is not None and watched is not None
        name, values = watched.metric, dict(self.measured[watched.metric])
        said = f"published are the weights of step {best}, of {len(values)} measured steps the best: {name} {published[name]:.6g}"
        if best != last_step:
            said += f", and {values[last_step]:.6g} after the last step, {last_step}"
        if gain(published[name], before[name], watched.direction) <= 0:
            said += f"; no step was better than the model at the start: {before[name]:.6g}"
        return said

    def require_measured(self, found: Metrics) -> None:
        """Raises `RecipeError` if a metric that is watched is not among those that were found: names that data decides."""
        problems = []
        for param in ("publish_best", "stop_early"):
            watched = getattr(self.params, param)
            if watched is not None and watched.metric not in found:
                what = f"{watched.metric} is not measured on these held-out rows, but {', '.join(sorted(found))}"
                problems.append(Problem(f"params.{param}.metric", what, "Take one of these."))
        if problems:
            raise RecipeError(*problems)
