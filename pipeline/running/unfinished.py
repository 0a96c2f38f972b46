"""Work that was begun: the folder that a step goes on from, under whatever name the step had then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, StoreError
from pipeline.store.store import Store
from pipeline.store.works import read_work, works_on

HASHED_AT_PLAN_BYTES = 64_000_000
"""Checkpoints up to this size are hashed when a plan is made; of larger ones only the sizes are compared until they are used."""


@dataclass(frozen=True)
class Unfinished:
    """A work folder that works on an artifact, and the newest checkpoint in it that verified."""

    folder: Path
    running: str | None
    """Who runs it, in words."""
    newest: Path | None = None
    step: int = 0
    verified: bool = True
    passed_over: tuple[str, ...] = ()


def look_at(folder: Path, store: Store) -> Unfinished:
    if running := store.running(folder):
        return Unfinished(folder, f"{running.who} runs it; log: {running.log}")
    checkpoints = read_work(folder).checkpoints
    newest = checkpoints.newest(hashes=False)
    verified = True
    if newest.path:
        size = sum(path.stat().st_size for path in newest.path.rglob("*") if path.is_file())
        verified = size <= HASHED_AT_PLAN_BYTES
    if newest.path and verified:
        newest = checkpoints.newest()
    return Unfinished(folder, None, newest.path, newest.step, verified, tuple(newest.passed_over))


def find_unfinished(own: Path, artifact_id: str, folders: Sequence[Path], store: Store) -> Unfinished | None:
    """Of the work folders that work on the artifact the one that runs, else the one with the newest checkpoint, else the
    step's own; None where there is none."""
    candidates = [own] if own in folders else []
    candidates += [work.folder for work in works_on(folders, artifact_id) if work.folder != own]
    found = [look_at(folder, store) for folder in candidates]
    return max(found, key=lambda each: (bool(each.running), each.step, each.folder == own), default=None)


def take_over(adopts: Path | None, own: Path, store: Store) -> None:
    """Moves the work of a step that had another name to where it is looked for under its present one."""
    if adopts is None or not adopts.is_dir():
        return
    if running := store.running(adopts):
        raise StoreError(Problem(str(adopts), f"is being run by {running.who}", "Wait for it, or stop it."))
    if not read_work(adopts).can_resume():
        # Another step of the recipe, which makes the same, has ended it meanwhile.
        return
    if own.exists():
        store.discard(own)
    adopts.rename(own)
