"""Where a training on fixed data begins: with nothing, with its own newest checkpoint, or with the last one of what it extends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ArtifactError, Problem, RecipeError
from pipeline.stage import EXTENDS, Context
from stages.lib.processes.collectives import from_main
from stages.lib.training.extension import extension_problems
from stages.lib.training.params import Batch, TrainingParams
from stages.lib.training.scheduling import fingerprint
from stages.lib.training.state import NOT_EXTENDED, Saved, check_state, find_saved, read_state, why_unreadable
from stages.lib.training.watching import Watching

LENGTH = ("total_steps", "schedule_steps")
"""What a training that extends another one need not have in common with it."""


def identity_of_run(ctx: Context, params: TrainingParams, steps: int, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that resumes from it."""
    identity = {"total_steps": steps, "global_batch_size": params.global_batch_size}
    identity |= {"seed": ctx.seed, "data": fingerprint(data)}
    return identity | ({"schedule_steps": params.schedule_steps} if params.schedule_steps else {})


def find_start(ctx: Context, params: TrainingParams, identity: Mapping[str, Any]) -> Saved | None:
    """What the run goes on from, the same in every process; None where it begins.

    Raises `ArtifactError` or `RecipeError` if it is the training that the run extends, and cannot be extended so.
    """
    saved = find_saved(ctx, identity)
    if saved is not None or not is_extension(ctx):
        return saved
    if ctx.extends is None:
        what = "has left no checkpoint, and none of this step can be read"
        raise ArtifactError(Problem(f"inputs.{EXTENDS}", what, NOT_EXTENDED))
    return from_main(lambda: extended_training(ctx, params, identity))


def is_extension(ctx: Context) -> bool:
    """Whether the run makes another training longer."""
    return ctx.extends is not None or EXTENDS in ctx.inputs


def extended_training(ctx: Context, params: TrainingParams, identity: Mapping[str, Any]) -> Saved:
    folder = ctx.extends
    assert folder is not None
    if reason := why_unreadable(folder):
        hint = "Make what it was written by anew, or leave out the input extends."
        raise ArtifactError(Problem(str(folder), f"cannot be extended: {reason}", hint))
    saved = Saved(folder, read_state(folder), extended=True)
    common = {name: value for name, value in identity.items() if name not in LENGTH}
    check_state(ctx, saved, common)
    state = saved.state
    fell_over = int(state.get("schedule_steps") or state["total_steps"])
    problems = extension_problems(params, int(identity["total_steps"]), state["step"], fell_over)
    watching = Watching.of(params, saved.state)
    if watching.ends:
        what = "would end the training at once: what it extends had stopped early by the same rule"
        problems.append(Problem("params.stop_early", what, "Raise its patience, or remove it."))
    if problems:
        raise RecipeError(*problems)
    for metric, measured in watching.measured.items():
        if not measured:
            ctx.journal.note(
                f"what is extended did not watch {metric}: only steps after {state['step']} are compared by it"
            )
    return saved


def take_over_best(ctx: Context, saved: Saved, watching: Watching) -> None:
    """Copies the best weights so far from what is extended, which may be removed before they are published.

    Called once this run has a checkpoint of its own, which needs them: without them it does not count.
    """
    best = watching.best
    if best is None or best == saved.state["step"]:
        return
    target = ctx.checkpoints.path(best)
    source = saved.folder.with_name(target.name)

    def copy() -> None:
        if not source.is_dir():
            what = f"is gone, and holds the best weights by {watching.metrics[0]} of what is extended"
            raise ArtifactError(Problem(str(source), what, "Remove publish_best, or make what is extended anew."))
        ctx.checkpoints.require_room(sum(path.stat().st_size for path in source.rglob("*") if path.is_file()))
        shutil.copytree(source, target, dirs_exist_ok=True)

    from_main(copy)


def in_passes(num_rows: int, steps: int, batch: Batch) -> str:
    """How often the training rows are seen, for the journal."""
    passes = steps * batch.global_batch_size / num_rows
    return f"{num_rows:,} rows, {steps:,} steps of {batch}: {passes:.2f} passes"
