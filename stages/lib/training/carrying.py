"""What is learned, and what that carries from one optimizer step to the next: it is in a checkpoint, so that a resume is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from stages.lib.formulas.token_losses import Tensors

KEY = "objective"
"""Where it stands in a checkpoint."""


class Objective(Protocol):
    """What is learned."""

    def count(self, batch: Tensors) -> torch.Tensor:
        """How many units (label tokens, pairs, examples) the micro batch's loss is summed over. A scalar."""

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The loss summed over those units, in float32. Must call `model(...)` exactly once: DDP counts on it."""


@runtime_checkable
class Carrying(Protocol):
    """What such an objective has besides what all have."""

    def begin_step(self) -> None:
        """Called before the first micro batch of a step."""

    def end_step(self) -> None:
        """Called after the last micro batch of a step, in all processes together."""

    def carried(self) -> dict[str, float]:
        """What `carry_on` needs to go on from here, the same in every process. Empty if it carries nothing."""

    def carry_on(self, carried: Mapping[str, float]) -> None:
        """Goes on from what `carried` returned."""


@runtime_checkable
class LookingAhead(Protocol):
    """What an objective has besides that asks something of a whole step before it learns from it."""

    def look_ahead(self, model: torch.nn.Module, batches: Iterable[Tensors]) -> None:
        """Called before the first micro batch of a step, in all processes together, with those of this process: as many in
        each of them. What it finds must be the same in every process, and a function of the rows and the weights alone.
        """


@contextlib.contextmanager
def one_step(objective: object, model: torch.nn.Module, batches: Iterable[Tensors]) -> Iterator[None]:
    """Around the micro batches of a step."""
    if isinstance(objective, LookingAhead):
        objective.look_ahead(model, batches)
    if isinstance(objective, Carrying):
        objective.begin_step()
    yield
    if isinstance(objective, Carrying):
        objective.end_step()


def carried_by(objective: object) -> dict[str, Any]:
    """Its part of a checkpoint; nothing for an objective that carries nothing."""
    carried = objective.carried() if isinstance(objective, Carrying) else {}
    return {KEY: carried} if carried else {}


def go_on(objective: object, state: Mapping[str, Any]) -> None:
    """Gives it back what a checkpoint holds of it."""
    if isinstance(objective, Carrying) and KEY in state:
        objective.carry_on(state[KEY])
