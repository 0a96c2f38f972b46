"""`python -m tests.unit.waiting_run FOLDER STAGE PROCESSES [FIELD=VALUE...]`: runs a step that waits until it is asked to stop.

A stage, a launcher and a recipe of a few lines stand for what takes torch a minute; all else is the program's own. The
stages: `saves` stops at its next boundary, `deaf` asks at none, `half` asks in rank 0 only, `mistaken` finds
a mistake in rank 1 only, `stateless` has no state.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from launch.base import LocalProcess
from pipeline.errors import DataError, Preempted, Problem
from pipeline.recipe.reader import load_recipe
from pipeline.running.execute import execute
from pipeline.running.plan import make_plan
from pipeline.running.progress import Progress
from pipeline.running.worker import main as work
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Result, Stage
from pipeline.store.artifact import Kind
from pipeline.store.job import Job
from pipeline.store.store import Store


class NoParams(Strict):
    pass


def wait(ctx: Context, params: NoParams, hears: bool) -> Result:
    ctx.journal.note("waiting")
    (ctx.work / f"waiting-{ctx.world.rank}").touch()
    while True:
        time.sleep(0.02)
        if hears and (ctx.stop_requested() or (ctx.work / "stop-requested").exists()):
            raise Preempted("saved checkpoint 3")


def saves(ctx: Context, params: NoParams) -> Result:
    return wait(ctx, params, True)


def deaf(ctx: Context, params: NoParams) -> Result:
    return wait(ctx, params, False)


def half(ctx: Context, params: NoParams) -> Result:
    return wait(ctx, params, ctx.world.is_main)


def mistaken(ctx: Context, params: NoParams) -> Result:
    if not ctx.world.is_main:
        (ctx.work / "waiting-1").touch()
        raise DataError(Problem("rows.jsonl:3", "has no field 'text'", "Add it."))
    return wait(ctx, params, False)


STAGES = {
    name: Stage(name, 1, "waits", NoParams, {}, Kind.TEXT, run, distributed=name != "stateless")
    for name, run in (("saves", saves), ("deaf", deaf), ("half", half), ("mistaken", mistaken), ("stateless", deaf))
}


class Ranks(LocalProcess):
    """Starts the ranks as this module's `rank`s and waits for all."""

    name = "torchrun"

    def command(self, job: Job) -> list[str]:
        return [sys.executable, "-m", __spec__.name, "ranks", str(job.resources.processes), job.work]


def start_ranks(processes: int, folder: str) -> int:
    command = [sys.executable, "-m", __spec__.name, "rank", folder]
    world = {**os.environ, "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(command, env={**world, "RANK": str(rank)}, start_new_session=True) for rank in range(processes)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def run(folder: Path, stage: str, processes: str, *fields: str) -> int:
    recipe = folder / "recipe.yaml"
    resources = ", ".join(["launcher: torchrun" if stage != "stateless" else "launcher: local", *fields])
    recipe.write_text(
        f"name: waiting\noutputs: [step]\nstages:\n  step: {{kind: {stage}, resources: {{processes: {processes}, {resources}}}}}\n"
    )
    launchers = {"torchrun": Ranks(), "local": Ranks()}
    store = Store(folder / "runs")
    return execute(make_plan(load_recipe(recipe, STAGES, launchers), store), store, launchers, Progress())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ranks", processes, folder]:
            sys.exit(start_ranks(int(processes), folder))
        case ["rank", folder]:
            sys.exit(work([folder], STAGES))
        case [folder, stage, processes, *fields]:
            sys.exit(run(Path(folder), stage, processes, *fields))
