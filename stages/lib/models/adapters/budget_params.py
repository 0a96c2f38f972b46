"""What a recipe says of an adapter whose ranks are found while it is trained. Imports no torch: `plan` reads it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from stages.lib.formulas.bounds import Scale, Weight
from stages.lib.models.adapters.block import AdapterBlock, ModuleNames


class Phases(NamedTuple):
    """Optimizer steps of a training, counted from 1."""

    warmup: int
    """How many there are before anything is pruned."""
    pruned: int
    """The step after which all that is to be pruned is."""
    steps: int
    """All of them."""


class AdaLoraMethod(AdapterBlock):
    """W + (alpha / rank) B diag(e) A beside frozen linear layers: numbers of e that matter least become zero (Zhang et al., 2023)."""

    method: Literal["adalora"]
    """Low-rank matrices beside linear layers, whose ranks are found in training."""
    rank: int = Field(default=12, ge=2)
    """Rank of the matrices in every layer, in the beginning."""
    target_rank: int = Field(default=8, ge=1)
    """Their mean rank over the layers, in the end. Less than rank."""
    alpha: Scale = 32.0
    """What they add is multiplied by alpha / rank, whatever is pruned."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that the matrices do not see in training."""
    target_modules: ModuleNames | str | None = Field(default=None, min_length=1)
    """The linear layers that get one, as for lora. null: all of them but the output layer."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps, in the beginning, in which nothing is pruned."""
    final_fraction: float = Field(default=0.5, ge=0, lt=1)
    """Share of the optimizer steps, in the end, in which the ranks stay as they are. Between the two shares the ranks fall, their sum as a cubic."""
    allocate_every_steps: int = Field(default=1, ge=1)
    """Optimizer steps from one pruning to the next; what was pruned may come back between them until the ranks stay as they are."""
    sensitivity_decay: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the running mean of |weight times gradient|."""
    uncertainty_decay: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the running mean of how far that is from its mean."""
    orthogonal_weight: Weight = 0.5
    """Weight of the mean of |A A^T - 1| and |B^T B - 1| over all matrices (Frobenius norms) in what is minimized. The loss in the journal is told without it."""

    @model_validator(mode="after")
    def something_is_pruned(self) -> AdaLoraMethod:
        if self.target_rank >= self.rank:
            raise ValueError(f"target_rank {self.target_rank} must be below rank {self.rank}: with as much, take lora")
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ValueError("warmup_fraction and final_fraction leave no steps to prune in: their sum must be below 1")
        return self

    def phases(self, steps: int) -> Phases:
        """The phases of a training of so many steps."""
        return Phases(round(self.warmup_fraction * steps), steps - round(self.final_fraction * steps), steps)

    def too_short(self, steps: int) -> str | None:
        """Why a training of so many steps cannot prune, where that is so."""
        warmup, pruned, _ = self.phases(steps)
        if pruned > max(warmup, 1):
            return None
        return (
            f"adapter: adalora has no steps to prune in: of {steps} steps {warmup} are before and {steps - pruned} after."
            " Train longer, lower warmup_fraction or final_fraction, or take lora"
        )
