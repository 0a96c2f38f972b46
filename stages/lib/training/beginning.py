"""Where a training on fixed data begins: with nothing, with its own newest checkpoint, or with the last one of what it extends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.errors import ArtifactError, Problem, RecipeError
from pipeline.stage import EXTENDS, Context
from stages.lib.processes.collectives import from_main
from stages.lib.training.carrying import KEY, carried_by, go_on
from stages.lib.training.engine import Engine
from stages.lib.training.extension import extension_problems
from stages.lib.training.params import Batch, TrainingParams
from stages.lib.training.resuming import Unfit, load_saved
from stages.lib.training.scheduling import fingerprint
from stages.lib.training.state import (
    NOT_EXTENDED,
    Saved,
    TrainingProgress,
    cannot_be_extended,
    check_state,
    find_saved,
    read_state,
    restored_metrics,
    why_not_restored,
)
from stages.lib.training.watching import KEY as WATCHED
from stages.lib.training.watching import Watching

LENGTH = ("total_steps", "schedule_steps")
"""What a training that extends another one need not have in common with it."""


def identity_of_run(ctx: Context, params: TrainingParams, steps: int, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that resumes from it."""
    identity = {"total_steps": steps, "global_batch_size": params.global_batch_size}
    identity |= {"seed": ctx.seed, "data": fingerprint(data)}
    return identity | ({"schedule_steps": params.schedule_steps} if params.schedule_steps else {})


def find_start(
    ctx: Context, params: TrainingParams, identity: Mapping[str, Any], objective: object, unfit: Unfit | None = None
) -> Saved | None:
    """What the run goes on from, the same in every process; None where it begins. `unfit`: `find_saved`.

    Raises `ArtifactError` or `RecipeError` if it is the training that the run extends, and cannot be extended so.
    """
    saved = find_saved(ctx, identity, partial(restore, params, objective), unfit)
    if saved is not None or not is_extension(ctx):
        return saved
    if ctx.extends is None:
        what = "has left no checkpoint, and none of this step can be read"
        raise ArtifactError(Problem(f"inputs.{EXTENDS}", what, NOT_EXTENDED))
    return from_main(lambda: extended_training(ctx, params, identity, objective))


def load_start(
    ctx: Context,
    params: TrainingParams,
    identity: Mapping[str, Any],
    objective: object,
    engine: Engine,
    saved: Saved | None,
) -> Saved | None:
    """What engine and objective go on from: `saved`, or what comes before it where it is not what training writes."""
    saved = load_saved(engine, saved, partial(find_start, ctx, params, identity, objective))
    if saved is not None:
        go_on(objective, saved.state)
    return saved


def restore(params: TrainingParams, objective: object, saved: Saved) -> None:
    """Raises one of `UNREADABLE` where our part of a checkpoint lacks what the run goes on with."""
    TrainingProgress.of(saved)
    if Watching.of(params, saved.state).metrics and not saved.extended and WATCHED not in saved.state:
        raise ValueError(WATCHED)
    carried = {KEY: restored_metrics(saved.state[KEY])} if KEY in saved.state else {}
    for name, before in carried_by(objective).items():
        if set(carried[name]) != set(before):
            raise ValueError(name)


def is_extension(ctx: Context) -> bool:
    """Whether the run makes another training longer."""
    return ctx.extends is not None or EXTENDS in ctx.inputs


def extended_training(ctx: Context, params: TrainingParams, identity: Mapping[str, Any], objective: object) -> Saved:
    folder = ctx.extends
    assert folder is not None
    common = {name: value for name, value in identity.items() if name not in LENGTH}
    take = partial(restore, params, objective)
    if reason := why_not_restored(folder, take, lambda each: check_state(ctx, each, common), extended=True):
        raise cannot_be_extended(folder, reason)
    saved = Saved(folder, read_state(folder), extended=True)
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
