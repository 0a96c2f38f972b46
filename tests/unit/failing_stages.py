"""Stages that fail, fill the disk or wait to be stopped, and the real worker that runs them in a process of its own."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from launch import LAUNCHERS
from launch.base import LocalProcess
from pipeline.errors import DataError, GateError, Preempted, Problem, SlipwayError, StoreError
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


class FailingStageGroup(FailingStageProcess):
    """Two ranks under torchrun."""

    def command(self, job: Job) -> list[str]:
        torchrun = Path(sys.executable).with_name("torchrun")
        return [str(torchrun), "--standalone", "--nproc-per-node=2", "--no-python", *super().command(job)]


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


def scratch(ctx: Context, params: Params) -> Result:
    """Writes scratch files of all sorts, and ends by the amount: with a mistake, after a checkpoint, by the store, by a bug."""
    for name in ("rows/part/rows.jsonl", "rows.npy", "library.log"):
        (ctx.work / name).parent.mkdir(parents=True, exist_ok=True)
        (ctx.work / name).write_bytes(bytes(3000))
    (ctx.work / "link").symlink_to(ctx.work / "rows")
    (ctx.out / "model.bin").write_bytes(bytes(2000))
    match params.amount:
        case 2:
            folder = ctx.checkpoints.path(5)
            folder.mkdir(parents=True)
            (folder / "state").write_text("5")
            ctx.checkpoints.complete(5)
        case 3:
            raise StoreError(Problem(str(ctx.work), "is full", "Make room."))
        case 4:
            raise ZeroDivisionError("a bug")
    raise DataError(Problem("inputs.rows", "9% are broken", "Mend them."))


def scratch_of_ranks(ctx: Context, params: Params) -> Result:
    """Both ranks find the same mistake, rank 1 later, while it still reads what it wrote; the amount is what rank 0 writes."""
    rows = ctx.work / f"rows-{ctx.world.rank}.npy"
    rows.write_bytes(bytes(3000))
    if ctx.world.is_main and params.amount > 1:
        (ctx.out / "model.bin").write_bytes(bytes(params.amount))
    while ctx.world.rank == 0 and not (ctx.work / "rows-1.npy").exists():
        time.sleep(0.01)
    if ctx.world.rank == 1:
        time.sleep(1)
        assert len(rows.read_bytes()) == 3000
    raise DataError(Problem("inputs.rows", "9% are broken", "Mend them."))


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
    "scratch": Stage("scratch", 1, "leaves scratch files", Params, {}, Kind.TEXT, scratch),
    "scratch_of_ranks": Stage(
        "scratch_of_ranks", 1, "leaves scratch files", Params, {}, Kind.TEXT, scratch_of_ranks, distributed=True
    ),
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
        launchers = {"local": FailingStageProcess(), "torchrun": FailingStageGroup()}
        return execute(plan, store, launchers, Progress(stream)), stream.getvalue()
    except SlipwayError as error:
        return 2, f"{stream.getvalue()}{error}"
