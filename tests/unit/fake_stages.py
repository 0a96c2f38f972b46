"""Three-line stages for tests of the core: no torch, no data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from pipeline.errors import DataError, Preempted, Problem
from pipeline.settings.strict import Inlined, OutsidePath, Strict
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from pipeline.store.resumable import STATE


class Recipe(Strict):
    words: list[str] = ["a"]
    """Words to write."""


class WriteParams(Strict):
    count: int = Field(default=1, ge=1)
    """How many."""
    rate: float = 0.5
    """A number."""
    private: bool = False
    """Whether only the owner may read the file."""
    file: OutsidePath | None = None
    """A file whose content is written."""
    block: Inlined[Recipe] = Recipe()
    """A block, in place or in a file."""


class JoinParams(Strict):
    beta: float = 0.1
    """A number."""
    fail: str = ""
    """How to fail: user, crash, preempt, or not at all."""


class CountParams(Strict):
    steps: int = Field(default=4, ge=1)
    """How far to count."""
    by: int = 1
    """By how much."""
    file: OutsidePath | None = None
    """A file that is not read."""


def write(ctx: Context, params: WriteParams) -> Result:
    text = params.file.read_text() if params.file else "-"
    (ctx.out / "text.txt").write_text(f"{text} {params.count} {params.rate} {params.block.words} {ctx.seed}")
    if params.private:
        (ctx.out / "text.txt").chmod(0o600)
    ctx.journal.note("wrote a text")
    return Result(metrics={"count": params.count}, facts=Facts(train_rows=params.count))


def join(ctx: Context, params: JoinParams) -> Result:
    if ctx.resume:
        ctx.journal.note(f"resumed from {ctx.resume.name}")
    if params.fail == "user":
        raise DataError(Problem("rows.jsonl:3", "has no field 'text'", "Add it."))
    if params.fail == "crash":
        raise ZeroDivisionError("a bug")
    if params.fail == "preempt":
        raise Preempted("saved checkpoint 5")
    parts = {role: Path(path, "text.txt").read_text() for role, path in sorted(ctx.inputs.items())}
    (ctx.out / "text.txt").write_text(json.dumps(parts))
    return Result(metrics={"heldout_loss": params.beta, "parts": len(parts)})


def count(ctx: Context, params: CountParams) -> Result:
    """A training that only counts its steps, and keeps the count in its checkpoints."""
    start = ctx.resume or ctx.extends
    total = json.loads((start / STATE).read_text())["count"] if start else 0
    first = int(start.name.removeprefix("checkpoint-")) if start else 0
    ctx.journal.note(f"began after step {first}" + (f" of {start}" if start else ""))
    for step in range(first + 1, params.steps + 1):
        total += params.by
        folder = ctx.checkpoints.path(step)
        folder.mkdir(parents=True)
        state = {"step": step, "world_size": 1, "zero_stage": 0, "total_steps": params.steps, "count": total}
        (folder / STATE).write_text(json.dumps(state))
        ctx.checkpoints.complete(step)
        ctx.checkpoints.rotate()
    (ctx.out / "text.txt").write_text(str(total))
    return Result(metrics={"count": total}, facts=Facts(optimizer_steps=params.steps))


def estimate(forecast: Forecast) -> Estimate:
    return Estimate(train_rows=forecast.inputs["data"].train_rows, optimizer_steps=10)


def check(forecast: Forecast) -> list[Problem]:
    if forecast.params.beta > 1:
        return [Problem("params.beta", f"must be at most 1, not {forecast.params.beta}", "Lower it.")]
    return []


STAGES = {
    "count": Stage(
        "count", 1, "counts", CountParams,
        {"data": accepts(Kind.TEXT, optional=True), "extends": accepts(Kind.REPORT, optional=True)},
        Kind.REPORT, count, distributed=True, may_extend=frozenset({"steps"}),
    ),
    "write": Stage("write", 1, "writes", WriteParams, {}, Kind.TEXT, write),
    "join": Stage(
        "join", 1, "joins", JoinParams,
        {"data": accepts(Kind.TEXT), "more": accepts(Kind.TEXT, Kind.CHATS, optional=True, many=True)},
        Kind.CHATS, join, distributed=True, estimate=estimate, check=check, headline=("heldout_loss",),
    ),
}  # fmt: skip


class MeetingOptions(Strict):
    rendezvous: str | None = None
    """Where the nodes meet."""
    hosts: OutsidePath | None = None
    """A file."""


@dataclass(frozen=True)
class FakeLauncher:
    options: type[Strict]


class NoOptions(Strict):
    pass


LAUNCHERS = {"local": FakeLauncher(NoOptions), "torchrun": FakeLauncher(MeetingOptions)}
