"""`slipway gc`: which artifacts and work folders nobody needs any more, and their removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import SlipwayError
from pipeline.figures import size
from pipeline.store.artifact import MANIFEST, read_manifest
from pipeline.store.store import Store


def needed_artifacts(store: Store, current: Callable[[str, list[str]], set[str]]) -> tuple[set[str], list[str]]:
    """Ids that a recipe's current plan names, with all that finished ones among them were made from; and notes.

    `current(path, overrides)` plans a recipe as it is now. Where it cannot be planned, the plan that ran last counts,
    so that a recipe which is being edited loses nothing.
    """
    needed: set[str] = set()
    notes = []
    for name, record in store.records().items():
        recorded = {step["artifact_id"] for step in record["steps"].values()}
        try:
            needed |= current(record["path"], record["overrides"])
        except SlipwayError:
            notes.append(f"recipe {name} ({record['path']}) cannot be planned now: what it made last is kept")
            needed |= recorded
    return with_lineage(store, needed), notes


def with_lineage(store: Store, ids: Iterable[str]) -> set[str]:
    """The ids and every id that their artifacts were made from."""
    kept: set[str] = set()
    ahead = list(ids)
    while ahead:
        artifact_id = ahead.pop()
        if artifact_id in kept:
            continue
        kept.add(artifact_id)
        folder = store.artifact_folder(artifact_id)
        if (folder / MANIFEST).exists():
            ahead += read_manifest(folder).input_ids.values()
    return kept


def collect(store: Store, needed: set[str], *, dry_run: bool) -> list[str]:
    """Removes what is not needed (or with `dry_run` only says so); returns a line per removal and a sum."""
    lines = []
    freed = 0
    verb = "would remove" if dry_run else "removed"
    for folder, what in unneeded(store, needed):
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        freed += taken
        if not dry_run:
            store.discard(folder)
        lines.append(f"{verb} {what}, {size(taken)}")
    lines.append(f"{len(lines)} {'folder' if len(lines) == 1 else 'folders'}, {size(freed)}")
    return lines


def unneeded(store: Store, needed: set[str]) -> Iterable[tuple[Path, str]]:
    for folder in sorted(store.artifacts.iterdir()) if store.artifacts.is_dir() else []:
        if folder.name not in needed:
            step = read_manifest(folder).step if (folder / MANIFEST).exists() else "unfinished"
            yield folder, f"artifact {folder.name[:12]} ({step})"
    beginnings = {artifact_id[:8] for artifact_id in needed}
    for folder in sorted(store.work.iterdir()) if store.work.is_dir() else []:
        if folder.name.rpartition("-")[2] not in beginnings and store.running(folder) is None:
            yield folder, f"work {folder.name}"
    trash = store.folder / "trash"
    for folder in sorted(trash.iterdir()) if trash.is_dir() else []:
        yield folder, f"leftover {folder.name}"
