"""What a checkpoint holds of a run beside weights and optimizer, and whether a run may resume from it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ArtifactError, LaunchError, Problem
from pipeline.stage import Context
from pipeline.store import resumable
from pipeline.store.journal import Journal
from pipeline.store.numbers import json_text
from pipeline.store.resumable import STATE
from stages.lib.processes.collectives import from_main
from stages.lib.training.engine import PLAIN_STATE, TAG, Engine
from stages.lib.training.evaluating import Metrics
from stages.lib.training.forecast import CHECKPOINT_BYTES_PER_PARAMETER
from stages.lib.training.layouts import zero_stage
from stages.lib.training.params import Batch, TrainingParams, learning_rate_factor, schedule_length

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What reading a file raises that does not hold what a checkpoint holds."""


@dataclass
class Window:
    """Training loss since the last line of the journal."""

    loss_sum: float = 0.0
    units: float = 0.0
    last_mean: float | None = None

    def add(self, loss: float, units: float) -> None:
        self.loss_sum += loss * units
        self.units += units

    def close(self, *, goes_on: bool = False) -> float:
        """The mean loss per unit; the next window starts empty, or `goes_on`: a training that extends this one ends it."""
        self.last_mean = self.loss_sum / self.units
        if not goes_on:
            self.loss_sum = self.units = 0.0
        return self.last_mean


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be resumed from."""

    folder: Path
    state: Mapping[str, Any]
    """Our part of it: where the run stood, what it has in common with one that resumes, and what it carries on."""
    extended: bool = False
    """Whether it is of another training, which this run extends."""


@dataclass
class TrainingProgress:
    """How far the run is, and what it carries from one step to the next. All of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    window: Window = field(default_factory=Window)
    before: Metrics | None = None

    @classmethod
    def of(cls, saved: Saved | None) -> TrainingProgress:
        if saved is None:
            return cls()
        return cls(saved.state["step"], Window(**saved.state["window"]), saved.state["before"])


def find_saved(ctx: Context, identity: Mapping[str, Any]) -> Saved | None:
    """The newest verified checkpoint whose files can be read, the same in every process; None where there is none.

    One that cannot be read is passed over, and said. Raises `ArtifactError` if the checkpoint belongs to another run,
    `LaunchError` if it was written by processes or in a memory layout that DeepSpeed cannot turn into the present ones.
    """
    return from_main(lambda: newest_readable(ctx, identity)) if ctx.resume is not None else None


def newest_readable(ctx: Context, identity: Mapping[str, Any]) -> Saved | None:
    checkpoints, passed_over = ctx.checkpoints, []
    found = None
    for step in reversed(checkpoints.steps()):
        folder = checkpoints.path(step)
        if folder != ctx.resume and checkpoints.problems(step):
            continue
        reason = why_unreadable(folder)
        if not reason:
            found = Saved(folder, read_state(folder))
            break
        passed_over.append(f"checkpoint-{step} is not resumed from: {reason}")
    if found is not None:
        check_state(ctx, found, identity)
    step = found.state["step"] if found is not None else -1
    ctx.journal.rewind(step)
    checkpoints.discard_after(step)
    for sentence in passed_over:
        ctx.journal.note(sentence)
    return found


def why_unreadable(folder: Path) -> str:
    """What is wrong with a file of the checkpoint that is not what training writes; "" if all can be read.

    Nothing that stands in the files is run: they come from a disk that others may write to.
    """
    from stages.lib.training.deepspeed_files import load_data

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.name == STATE:
                read_state(folder)
            elif path.name == PLAIN_STATE or (path.suffix == ".pt" and TAG in path.parts):
                load_data(path, mmap=True)
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    for name in arrays.files:
                        arrays[name]
        except UNREADABLE as error:
            return f"{path.relative_to(folder)} cannot be read ({type(error).__name__})"
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """Our part of a checkpoint. Raises one of `UNREADABLE` where it is not that."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    for name in ("step", "world_size", "zero_stage"):
        if not isinstance(state[name], int):
            raise TypeError(name)
    return state


def check_state(ctx: Context, saved: Saved, identity: Mapping[str, Any]) -> None:
    """Raises `ArtifactError` or `LaunchError` where this run cannot go on from the checkpoint."""
    state, folder = saved.state, saved.folder
    for name, value in identity.items():
        if state.get(name) != value:
            what = f"belongs to another run: its {name} is {state.get(name)}, the recipe's is {value}"
            raise ArtifactError(Problem(str(folder), what, NOT_EXTENDED if saved.extended else start_over(ctx)))
    of_run = resumable.Saved(state["world_size"], state["zero_stage"])
    reason = resumable.mismatch(of_run, zero_stage(ctx.resources), ctx.world.size)
    if reason:
        over = NOT_EXTENDED if saved.extended else start_over(ctx)
        hint = f"Run as it was written: `slipway plan` says with which --set. {over}"
        raise LaunchError(Problem("resources", f"the checkpoint {folder} {reason}", hint))


NOT_EXTENDED = "To train from the beginning, leave out the input extends."


def start_over(ctx: Context) -> str:
    return f"To start over, remove {ctx.checkpoints.folder}."


def save_checkpoint(
    ctx: Context,
    engine: Engine,
    step: int,
    total_steps: int,
    num_parameters: int,
    content: Mapping[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint of this moment, unless there is one. All processes call it together.

    `content` becomes a part of our state, `write_more(folder)` adds files. Raises `StoreError` where the disk is full.
    """
    checkpoints = ctx.checkpoints
    folder = checkpoints.path(step)
    if from_main(lambda: folder.exists() and not checkpoints.problems(step, hashes=False)):
        return
    from_main(lambda: checkpoints.require_room(checkpoint_bytes(num_parameters)))
    engine.save(folder)

    def complete() -> None:
        if write_more is not None:
            write_more(folder)
        write_state(ctx, step, content)
        checkpoints.complete(step)
        checkpoints.rotate()
        ctx.journal.write("progress", what="checkpoint", step=step, done=step, total=total_steps)

    from_main(complete)


def write_state(ctx: Context, step: int, content: Mapping[str, Any]) -> None:
    """Adds our part to the checkpoint of `step`."""
    place = {"step": step, "world_size": ctx.world.size, "zero_stage": zero_stage(ctx.resources)}
    text = json_text({**place, **content}, STATE, indent=1)
    (ctx.checkpoints.path(step) / STATE).write_text(text, encoding="utf-8")


def load_weights_of(ctx: Context, engine: Engine, step: int) -> dict[str, Any]:
    """Brings back the weights of an earlier step, whose checkpoint was kept; returns our part of it.

    Raises `ArtifactError` where it is damaged. All processes call it together.
    """
    folder = ctx.checkpoints.path(step)

    def read() -> dict[str, Any]:
        if found := ctx.checkpoints.own_problems(step):
            what = f"holds the best weights, and cannot be used: {'; '.join(found[:3])}"
            raise ArtifactError(Problem(str(folder), what, start_over(ctx)))
        return read_state(folder)

    state: dict[str, Any] = from_main(read)
    engine.load(folder)
    return state


def write_receipt(ctx: Context, params: TrainingParams, batch: Batch, num_rows: int, steps: int, saved: Saved) -> None:
    """Says what was restored."""
    step, processes = saved.state["step"], saved.state["world_size"]
    position = step * batch.global_batch_size
    epoch, row = divmod(position, num_rows)
    ctx.journal.write(
        "resume",
        step=step,
        total_steps=steps,
        checkpoint=str(saved.folder),
        restored=["weights", "optimizer", "schedule", "data position", "loss window"],
        processes=processes,
        data_position=position,
        learning_rate=params.learning_rate * learning_rate_factor(params, step, schedule_length(params, steps)),
    )
    ctx.journal.note(
        f"{'extends another training, from' if saved.extended else 'resumed at'} step {step} of {steps}: weights, optimizer and schedule of {processes} processes;"
        f" next is row {row:,} of {num_rows:,} in pass {epoch + 1}"
    )


def checkpoint_bytes(num_parameters: int) -> int:
    """What a checkpoint takes on the disk, at most."""
    return num_parameters * CHECKPOINT_BYTES_PER_PARAMETER + 2**20


def find_measured(journal: Journal, step: int) -> Metrics | None:
    """The metrics of the `heldout` event at `step`, if there is one."""
    known = ("event", "time", "step", "total_steps")
    for event in journal.events("heldout"):
        if event["step"] == step:
            return {name: value for name, value in event.items() if name not in known}
    return None
