"""What the on-policy loop works with: an algorithm, models and rewards, and how far the run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.lib.formulas import policy_gradient as pg
from stages.lib.formulas.token_losses import Tensors
from stages.lib.generating.generator import Generator
from stages.lib.on_policy.actor_critic import ActorCritic, Judged
from stages.lib.on_policy.experience import Experience
from stages.lib.on_policy.ptx import ChatMixture
from stages.lib.on_policy.scoring import Scorer
from stages.lib.on_policy.turns import Unfolding
from stages.lib.text.batches import padding_of
from stages.lib.text.prompts import Prompts
from stages.lib.training.engine import Engine
from stages.lib.training.evaluating import Metrics
from stages.lib.training.state import (
    UNREADABLE,
    FileProblem,
    Saved,
    not_what_training_writes,
    restored,
    restored_metrics,
)

EXPERIENCE, WRITTEN = "experience.npz", "written.npz"
"""The files of a checkpoint with the completions of the rollout that is being learned from, and those of the next one where
they are written in the background."""


class Algorithm(Protocol):
    """What distinguishes the algorithms."""

    kl_in_loss: bool
    """Whether the divergence from the reference is a term of the loss, instead of a part of the reward."""
    value_coefficient: float
    """Weight of the critic's loss; 0 without a critic."""

    def controller(self) -> pg.KLController:
        """The coefficient of the KL penalty at the beginning, and how it is led."""

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Advantages and returns, each N x K (returns are what a critic learns), and what is worth logging of them."""

    def value_loss(self, values_BK: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Loss and clipped share of the critic, per token. Only called where there is one."""


@dataclass
class Progress:
    """How far the run is, and what it carries from one rollout to the next. All of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done, those of passes that were ended early counted as well."""
    controller: pg.KLController = field(default_factory=lambda: pg.KLController(0.0))
    moments: pg.RunningMoments = field(default_factory=pg.RunningMoments)
    before: Metrics | None = None
    collected: dict[str, Any] = field(default_factory=dict)
    """What was logged of the rollout that is being learned from."""
    sums: dict[str, float] = field(default_factory=dict)
    """What its optimizer steps so far add up to."""
    experience: Experience | None = None
    written: Experience | None = None
    """The completions of the next rollout, where they are written in the background: neither judged nor scored."""
    drawn: int = 0
    """Completions written so far in training, those left out counted as well: where the next rollout begins."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "controller": asdict(self.controller),
            "moments": asdict(self.moments),
            "before": self.before,
            "collected": self.collected,
            "sums": self.sums,
            "drawn": self.drawn,
        }

    @classmethod
    def of(cls, saved: Saved) -> Progress:
        """Where the run stood that wrote the checkpoint. Raises one of `UNREADABLE` where the checkpoint does not say it."""
        state = saved.state
        experience, written = (read_completions(saved.folder / name) for name in (EXPERIENCE, WRITTEN))
        if ("samples" in state["collected"]) != (experience is not None):
            raise FileProblem(f"{EXPERIENCE} is {'missing' if experience is None else 'of a rollout that has ended'}")
        return cls(
            step=state["step"],
            controller=restored(pg.KLController, state["controller"]),
            moments=restored(pg.RunningMoments, state["moments"]),
            before=restored_metrics(state["before"]),
            collected=dict(state["collected"]),
            sums=restored_metrics(state["sums"]),
            experience=experience,
            written=written,
            drawn=int(state.get("drawn", 0)),  # checkpoints of earlier versions are of runs that left nothing out
        )

    def save(self, folder: Path) -> None:
        """Adds completions to a checkpoint: those that are being learned from, and the next; the rest is `as_dict`."""
        if self.experience is not None:
            self.experience.save(folder / EXPERIENCE)
        if self.written is not None:
            self.written.save(folder / WRITTEN)


def read_completions(path: Path) -> Experience | None:
    """The completions in a file of a checkpoint; None where it has no such file. Raises `FileProblem`."""
    try:
        return Experience.load(path) if path.exists() else None
    except UNREADABLE as error:
        raise FileProblem(not_what_training_writes(path.name, error)) from error


@dataclass
class Aligned:
    """What the loop returns in every process."""

    before: Metrics
    after: Metrics
    last_rollout: Metrics
    """What the last line of the journal says of a rollout."""
    steps: int


@dataclass
class Parts:
    """What the loop works with."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    train: Prompts
    heldout: Prompts
    engine: Engine
    module: ActorCritic
    generator: Generator
    rates: list[float]
    """Highest learning rate of each of the optimizer's groups."""
    scorer: Scorer
    reference: Callable[..., Judged] | None
    """The reference's judgement, without gradients; None where nothing holds the policy to one."""
    mixture: ChatMixture | None
    parameters: int
    """Of all that is in memory for training."""
    policy_parameters: int
    """Of the policy alone, as it is published."""
    unfolding: Unfolding | None = None
    """What makes episodes of several turns; None where a completion is one turn."""

    @property
    def padding_id(self) -> int:
        return padding_of(self.tokenizer)

    def to_device(self, batch: Tensors) -> Tensors:
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items()}
