"""Runs one stage in this process, the way the worker does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.resources import Resources
from pipeline.settings.strict import Reading, Strict, validate
from pipeline.stage import Context, Result, Stage, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.params import FilesSource
from stages.lib.sources.read import read_source

REPO_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """What a stage made: the artifact's folder, and what it returned."""

    out: Path
    result: Result
    notes: list[str]

    def rows(self, name: str = "rows.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / name).read_text(encoding="utf-8").split("\n") if line]

    def json(self, name: str) -> Any:
        return json.loads((self.out / name).read_text(encoding="utf-8"))


def params_of(model: type[Strict], params: Mapping[str, Any], folder: Path) -> Any:
    """The params, as a recipe in `folder` would give them; fails the test with every problem."""
    validated, problems = validate(model, params, "params", Reading([folder]))
    assert validated is not None, "\n".join(map(str, problems))
    return validated


def problems_of(model: type[Strict], params: Mapping[str, Any], folder: Path) -> str:
    """What a recipe's author is told of the params, which must be wrong."""
    validated, problems = validate(model, params, "params", Reading([folder]))
    assert validated is None
    return "\n".join(map(str, problems))


def run_stage(
    stage: Stage, params: Mapping[str, Any], folder: Path, inputs: Mapping[str, Path] | None = None, seed: int = 0
) -> Ran:
    """The stage run in `folder`, which must not hold a run yet."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out"
    out.mkdir()
    context = Context(
        inputs=dict(inputs or {}),
        out=out,
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=seed,
        resources=Resources(device="cpu"),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=lambda: False,
    )
    result = stage.run(context, params_of(stage.params, params, folder))
    return Ran(out, result, [event["text"] for event in context.journal.events("note")])


def read_files(folder: Path, **block: Any) -> tuple[list[dict[str, Any]], Ledger]:
    """The canonical rows of a `files` source, and what was counted while reading it."""
    source = params_of(FilesSource, {"kind": "files", **block}, folder)
    ledger = Ledger()
    rows = [row for _, row in read_source(source, source.given_format, ledger)]
    return rows, ledger
