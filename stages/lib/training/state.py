"""What a run keeps count of, what of that a checkpoint holds, and whether a run may resume from it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ArtifactError, LaunchError, Problem
from pipeline.stage import Context
from pipeline.store.journal import Journal
from stages.lib.training.evaluating import Metrics
from stages.lib.training.forecast import CHECKPOINT_BYTES_PER_PARAMETER
from stages.lib.training.layouts import zero_stage
from stages.lib.training.params import Batch, TrainingParams, learning_rate_factor

STATE = "slipway.json"
"""What we need of a checkpoint beyond what Trainer and DeepSpeed write."""


@dataclass
class Window:
    """Training loss since the last line of the journal."""

    loss_sum: float = 0.0
    units: float = 0.0
    last_mean: float | None = None

    def add(self, loss: float, units: float) -> None:
        self.loss_sum += loss * units
        self.units += units

    def close(self) -> float:
        """The mean loss per unit; the next window starts empty."""
        self.last_mean = self.loss_sum / self.units
        self.loss_sum = self.units = 0.0
        return self.last_mean


@dataclass
class Run:
    """What stays the same during one call of `train`, and what it keeps count of."""

    ctx: Context
    params: TrainingParams
    batch: Batch
    steps: int
    device: torch.device
    num_rows: int
    data_fingerprint: str
    parameters: int = 0
    window: Window = field(default_factory=Window)
    before: Metrics | None = None
    stopping: bool = False
    tokens_since: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it."""
        return {
            "total_steps": self.steps,
            "global_batch_size": self.batch.global_batch_size,
            "seed": self.ctx.seed,
            "data": self.data_fingerprint,
        }

    def carried(self) -> dict[str, Any]:
        """What a run that resumes goes on with."""
        return {"window": asdict(self.window), "before": self.before}


def write_state(ctx: Context, step: int, content: Mapping[str, Any]) -> None:
    """Adds our part to the checkpoint of `step`: what the run has in common with one that resumes, and what it carries on."""
    place = {"step": step, "world_size": ctx.world.size, "zero_stage": zero_stage(ctx.resources)}
    text = json.dumps({**place, **content}, indent=1, allow_nan=False)
    (ctx.checkpoints.path(step) / STATE).write_text(text, encoding="utf-8")


def check_checkpoint(ctx: Context, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Our part of the checkpoint that is resumed from.

    Raises `ArtifactError` if it belongs to another run, `LaunchError` if it was written by processes or in a memory layout
    that DeepSpeed cannot turn into the present ones.
    """
    path = Path(str(ctx.resume)) / STATE
    try:
        saved: dict[str, Any] = json.loads(path.read_bytes())
        differs = [name for name, value in identity.items() if saved[name] != value]
        processes, stage = saved["world_size"], saved["zero_stage"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(Problem(str(path), f"cannot be read: {error!r}", start_over(ctx))) from None
    if differs:
        name = differs[0]
        raise ArtifactError(
            Problem(
                str(ctx.resume),
                f"belongs to another run: its {name} is {saved[name]}, the recipe's is {identity[name]}",
                start_over(ctx),
            )
        )
    now = zero_stage(ctx.resources)
    if stage != now:
        raise LaunchError(
            Problem(
                "resources.deepspeed",
                f"the checkpoint {ctx.resume} was written {layout_words(stage)}, this run is {layout_words(now)}",
                f"Run {layout_words(stage)} again. {start_over(ctx)}",
            )
        )
    if stage and processes != ctx.world.size:
        raise LaunchError(
            Problem(
                "resources.processes",
                f"the checkpoint {ctx.resume} was written by {processes} processes, this run has {ctx.world.size}",
                f"DeepSpeed needs the same number: run with `--set` so that processes x nodes is {processes}. {start_over(ctx)}",
            )
        )
    return saved


def start_over(ctx: Context) -> str:
    return f"To start over, remove {ctx.checkpoints.folder}."


def layout_words(stage: int) -> str:
    return f"under ZeRO-{stage}" if stage else "without DeepSpeed"


def write_receipt(run: Run, saved: Mapping[str, Any]) -> None:
    """Says what was restored."""
    step, processes = saved["step"], saved["world_size"]
    position = step * run.batch.global_batch_size
    epoch, row = divmod(position, run.num_rows)
    run.ctx.journal.write(
        "resume",
        step=step,
        total_steps=run.steps,
        checkpoint=str(run.ctx.resume),
        restored=["weights", "optimizer", "schedule", "random generators", "data position", "loss window"],
        processes=processes,
        data_position=position,
        learning_rate=run.params.learning_rate * learning_rate_factor(run.params, step, run.steps),
    )
    run.ctx.journal.note(
        f"resumed at step {step} of {run.steps}: weights, optimizer, schedule, generators of {processes} processes;"
        f" next is row {row:,} of {run.num_rows:,} in pass {epoch + 1}"
    )


def checkpoint_bytes(run: Run) -> int:
    """What a checkpoint takes on the disk, at most."""
    return run.parameters * CHECKPOINT_BYTES_PER_PARAMETER + 2**20


def find_measured(journal: Journal, step: int) -> Metrics | None:
    """The metrics of the `heldout` event at `step`, if there is one."""
    known = ("event", "time", "step", "total_steps")
    for event in journal.events("heldout"):
        if event["step"] == step:
            return {name: value for name, value in event.items() if name not in known}
    return None
