"""Stages that fail, fill the disk or wait to be stopped, and the real worker that runs them in a process of its own."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from launch import LAUNCHERS
from launch.base import LocalProcess
from pipeline.errors import GateError, Preempted, Problem, SlipwayError
from pipeline.recipe.reader import load_recipe
from pipeline.running.execute import execute
from pipeline.running.plan import Plan, make_plan
from pipeline.running.progress import Progress
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Result, Stage
from pipeline.store.artifact import Kind
from pipeline.store.job import Job
from pipeline.store.store import Store

DRIVER = "import sys; from pipeline.running.worker import main; from tests.unit.failing_stages import STAGES; sys.exit(main(sys.argv[1:], STAGES))"


class FailingStageProcess(LocalProcess):
    def command(self, job: Job) -> list[str]:
        return [sys.executable, "-c", DRIVER, job.work]


class Params(Strict):
    amount: int = 1
    """How much."""


def write(ctx: Context, params: Params) -> Result:
    (ctx.out / "text.txt").write_text("a" * params.amount)
    ctx.journal.note("wrote a text")
    return Result()


def gate(ctx: Context, params: Params) -> Result:
    (ctx.out / "model.bin").write_bytes(bytes(2000))
    raise GateError(Problem("params.bar", "is missed", "Lower it."))


def crash(ctx: Context, params: Params) -> Result:
    (ctx.out / "model.bin").write_bytes(bytes(2000))
    raise ZeroDivisionError("a bug")


def wrap(ctx: Context, params: Params) -> Result:
    """Fills the disk and says so as a library might: in words of its own, with the reason behind."""
    try:
        with (ctx.out / "model.bin").open("wb") as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        raise RuntimeError("An error occurred while generating the dataset") from error


def wait(ctx: Context, params: Params) -> Result:
    """Waits to be stopped; a run that resumes ends at once."""
    if ctx.resume is None:
        print("waiting", flush=True)
        while not ctx.stop_requested():
            time.sleep(0.05)
        folder = ctx.checkpoints.path(5)
        folder.mkdir(parents=True)
        (folder / "state").write_text("5")
        ctx.checkpoints.complete(5)
        raise Preempted("saved checkpoint 5")
    (ctx.out / "text.txt").write_text((ctx.resume / "state").read_text())
    return Result()


STAGES = {
    "write": Stage("write", 1, "writes", Params, {}, Kind.TEXT, write),
    "gate": Stage("gate", 1, "misses its bar", Params, {}, Kind.TEXT, gate),
    "crash": Stage("crash", 1, "crashes", Params, {}, Kind.TEXT, crash),
    "wrap": Stage("wrap", 1, "fills the disk", Params, {}, Kind.TEXT, wrap),
    "wait": Stage("wait", 1, "waits", Params, {}, Kind.TEXT, wait),
    "save": Stage("save", 1, "waits, and saves", Params, {}, Kind.TEXT, wait, distributed=True),
}


def begun(folder: Path, kind: str, *overrides: str) -> tuple[Job, Store]:
    """The job of a recipe with one step of this kind, ready to run."""
    plan, store = planned(folder, kind, *overrides)
    job = plan.step("one").job("demo", store)
    store.begin(job)
    return job, store


def planned(folder: Path, kind: str, *overrides: str) -> tuple[Plan, Store]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"name: demo\noutputs: [one]\nstages:\n  one: {{kind: {kind}}}\n")
    store = Store(folder / "runs")
    return make_plan(load_recipe(recipe, STAGES, LAUNCHERS, overrides), store), store


def run(folder: Path, kind: str, *overrides: str) -> tuple[int, str]:
    """(exit code, what was printed) of `slipway run` for a recipe with one step of this kind."""
    stream = io.StringIO()
    try:
        plan, store = planned(folder, kind, *overrides)
        return execute(plan, store, {"local": FailingStageProcess()}, Progress(stream)), stream.getvalue()
    except SlipwayError as error:
        return 2, f"{stream.getvalue()}{error}"
