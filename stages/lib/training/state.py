"""What a checkpoint holds of a run beside weights and optimizer, and whether a run may resume from it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pipeline.errors import ArtifactError, LaunchError, Problem
from pipeline.stage import Context
from pipeline.store import resumable
from pipeline.store.checkpoints import PREFIX
from pipeline.store.journal import Journal
from pipeline.store.numbers import json_text
from pipeline.store.resumable import STATE
from stages.lib.processes.collectives import from_main
from stages.lib.training.engine import Engine
from stages.lib.training.evaluating import Metrics
from stages.lib.training.forecast import CHECKPOINT_BYTES_PER_PARAMETER
from stages.lib.training.layouts import spread_of_run
from stages.lib.training.params import Batch, TrainingParams, learning_rate_factor, schedule_length

UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What reading a file raises that does not hold what a checkpoint holds."""

Fields = TypeVar("Fields")


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
    passed_over: Mapping[int, str] = field(default_factory=dict)
    """Step -> why its newer checkpoint was not taken."""


@dataclass
class TrainingProgress:
    """How far the run is, and what it carries from one step to the next. All of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    window: Window = field(default_factory=Window)
    before: Metrics | None = None

    @classmethod
    def of(cls, saved: Saved | None) -> TrainingProgress:
        """Where the run stood. Raises one of `UNREADABLE` where the checkpoint does not say it."""
        if saved is None:
            return cls()
        state = saved.state
        return cls(state["step"], restored(Window, state["window"]), restored_metrics(state["before"]))


class FileProblem(ValueError):
    """A file beside our part of a checkpoint that is not what training writes; its message names it."""


def not_what_training_writes(name: str, error: Exception) -> str:
    return (
        str(error) if isinstance(error, FileProblem) else f"{name} is not what training writes ({type(error).__name__})"
    )


Restore = Callable[[Saved], object]
"""Takes out of our part of a checkpoint what a training goes on with. Raises one of `UNREADABLE` where that is not there."""


def find_saved(
    ctx: Context, identity: Mapping[str, Any], restore: Restore, unfit: Mapping[int, str] | None = None
) -> Saved | None:
    """The newest verified checkpoint of which our part can be restored, the same in every process; None where there is none.

    One that cannot is passed over, and said; so are those of the steps in `unfit`, for the reasons there. Raises
    `ArtifactError` if the checkpoint belongs to another run, `LaunchError` if it was written in a memory layout, or is
    read in one, whose checkpoints cannot be converted.
    """
    if ctx.resume is None:
        return None
    found: Saved | None = from_main(lambda: newest_readable(ctx, identity, restore, unfit or {}))
    return found


def newest_readable(
    ctx: Context, identity: Mapping[str, Any], restore: Restore, unfit: Mapping[int, str]
) -> Saved | None:
    checkpoints, passed_over = ctx.checkpoints, dict[int, str]()
    found = None
    for step in reversed(checkpoints.steps()):
        folder = checkpoints.path(step)
        if folder != ctx.resume and checkpoints.problems(step):
            continue
        reason = unfit.get(step) or why_not_restored(folder, restore, lambda each: check_state(ctx, each, identity))
        for other in checkpoints.needs(step):
            if not reason and (missing := why_not_restored(checkpoints.path(other), restore)):
                reason = f"it needs {PREFIX}{other}: {missing}"
        if not reason:
            found = Saved(folder, read_state(folder), passed_over=passed_over)
            break
        passed_over[step] = reason
    step = found.state["step"] if found is not None else -1
    ctx.journal.rewind(step)
    checkpoints.discard_after(step)
    # What was said of others before is gone from a journal that begins anew.
    for step, reason in (passed_over if found is not None else {**unfit, **passed_over}).items():
        ctx.journal.note(f"checkpoint-{step} is not resumed from: {reason}")
    return found


def why_not_restored(
    folder: Path, restore: Restore, check: Callable[[Saved], None] | None = None, *, extended: bool = False
) -> str:
    """What is wrong with our part of the checkpoint; "" if a training can go on from it.

    `check` raises where the checkpoint is another run's: of such a one nothing more is asked.
    """
    try:
        saved = Saved(folder, read_state(folder), extended)
    except UNREADABLE as error:
        return not_what_training_writes(STATE, error)
    if check is not None:
        check(saved)
    try:
        restore(saved)
    except UNREADABLE as error:
        return not_what_training_writes(STATE, error)
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """Our part of a checkpoint. Raises one of `UNREADABLE` where it is not that."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    for name in ("step", "world_size", "zero_stage"):
        if not isinstance(state[name], int):
            raise TypeError(name)
    if folder.name != f"{PREFIX}{state['step']}":
        raise ValueError("step")
    return state


def restored(kind: type[Fields], said: Mapping[str, Any]) -> Fields:
    """The dataclass of which `asdict` was written. Raises one of `UNREADABLE` where it was not."""
    if set(said) != {each.name for each in fields(kind)}:  # type: ignore[arg-type]
        raise ValueError(kind.__name__)
    return TypeAdapter(kind).validate_json(json.dumps(said, allow_nan=False), strict=True)


def restored_metrics(said: Any) -> Metrics:
    """The metrics that were written. Raises `ValueError` where they were not."""
    return TypeAdapter(Metrics).validate_python(said, strict=True)


def check_state(ctx: Context, saved: Saved, identity: Mapping[str, Any]) -> None:
    """Raises `ArtifactError` or `LaunchError` where this run cannot go on from the checkpoint."""
    state, folder = saved.state, saved.folder
    for name, value in identity.items():
        if state.get(name) != value:
            what = f"belongs to another run: its {name} is {state.get(name)}, the recipe's is {value}"
            raise ArtifactError(Problem(str(folder), what, NOT_EXTENDED if saved.extended else start_over(ctx)))
    of_run = resumable.Saved(state["world_size"], state["zero_stage"], bound=state.get("bound", ""))
    if reason := resumable.mismatch(of_run, spread_of_run(ctx)):
        over = NOT_EXTENDED if saved.extended else start_over(ctx)
        hint = f"Run as it was written: `slipway plan` says with which --set. {over}"
        raise LaunchError(Problem("resources", f"the checkpoint {folder} {reason}", hint))


NOT_EXTENDED = "To train from the beginning, leave out the input extends."


def cannot_be_extended(folder: Path, reason: str) -> ArtifactError:
    hint = "Make what it was written by anew, or leave out the input extends."
    return ArtifactError(Problem(str(folder), f"cannot be extended: {reason}", hint))


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
    here = spread_of_run(ctx)
    place = {"step": step, "world_size": here.world_size, "zero_stage": here.zero_stage}
    place |= {"bound": here.bound, "layout": ctx.resources.deepspeed} if here.bound else {}
    text = json_text({**place, **content}, STATE, indent=1)
    (ctx.checkpoints.path(step) / STATE).write_text(text, encoding="utf-8")


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
        f"{'extends another training, from' if saved.extended else 'resumed at'} step {step} of {steps}: weights, optimizer and schedule of {processes} process{'es' * (processes > 1)};"
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
