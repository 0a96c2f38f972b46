"""`slipway gc`: which artifacts and work folders nobody needs any more, and their removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import SlipwayError
from pipeline.figures import size
from pipeline.store.store import Store, entries_of, is_folder


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
    needed |= store.made_by(store.damaged_records())
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
        manifest, _ = store.look_at(artifact_id)
        if manifest:
            ahead += manifest.input_ids.values()
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
    for folder in filter(is_folder, entries_of(store.artifacts)):
        if folder.name not in needed:
            manifest, problems = store.look_at(folder.name)
            step = manifest.step if manifest else "damaged" if problems else "unfinished"
            yield folder, f"artifact {folder.name[:12]} ({step})"
    beginnings = {artifact_id[:8] for artifact_id in needed}
    for folder in filter(is_folder, entries_of(store.work)):
        if folder.name.rpartition("-")[2] not in beginnings and store.running(folder) is None:
            yield folder, f"work {folder.name}"
    for folder in entries_of(store.folder / "trash"):
        yield folder, f"leftover {folder.name}"
