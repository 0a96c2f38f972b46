"""`slipway gc`: which artifacts and work folders nobody needs any more, and their removal.

Needed is what a recorded plan names, as it ran and as its recipe would be planned now; what a running or resumable step
makes and reads; and everything that any of these was made from. So that a run which starts meanwhile loses nothing, each
folder is first set aside, then needs are told once more, and only what is still not needed is deleted: a worker takes its
lock before it looks at what it reads, and a run records its plan before that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import Problem, SlipwayError, StoreError, did_you_mean, shown_path
from pipeline.figures import size
from pipeline.settings.paths import expanded
from pipeline.store.artifact import read_manifest
from pipeline.store.proofs import forget_gone
from pipeline.store.records import RecordedPlan, file_of, forget
from pipeline.store.store import Store, entries_of, is_folder
from pipeline.store.work_folder import remove
from pipeline.store.works import Work, read_work, work_folders

LEFTOVER_NANOSECONDS = int(3600e9)


Current = Callable[[str, list[str]], set[str]]
"""(path of a recipe, what is set) -> the ids that its plan names now."""


@dataclass
class Needs:
    """What must stay, and what to say about it."""

    artifacts: set[str] = field(default_factory=set)
    works: set[str] = field(default_factory=set)
    """Names of the work folders that run or can resume."""
    notes: list[str] = field(default_factory=list)


def needs_of(store: Store, current: Current, *, only_current: bool = False) -> Needs:
    """What the recipes and steps of the store need. With `only_current` only the plan that each recipe ran last counts, and
    of steps only those that run.

    Where a recipe cannot be planned as it is now, what it recorded counts alone, so that one that is being edited loses
    nothing. Steps are looked at last: what runs by then has recorded its plan.
    """
    needs = Needs()
    records = store.records()
    newest = records.newest()
    for plan in records.plans:
        if only_current and plan not in newest and not plan.goes_on:
            continue
        needs.artifacts |= plan.ids
        try:
            needs.artifacts |= current(plan.path, plan.overrides)
        except (SlipwayError, OSError, ValueError, RecursionError):
            needs.notes.append(f"recipe {plan.label} ({plan.path}) cannot be planned now: what it made last is kept")
    for plan in records.replaced:
        needs.artifacts |= plan.ids
        needs.notes.append(f"recipe {plan.label} ({plan.path}) still runs as it was before: what it needs is kept")
    for odd in records.odd:
        kept = made_by(store, odd.recipes)
        needs.artifacts |= kept
        needs.notes.append(f"{odd}. What recipes of this name made ({len(kept)} artifacts) is kept")
    needs_of_works(store, needs, only_current=only_current)
    needs.artifacts = with_lineage(store, needs.artifacts)
    return needs


def needs_of_works(store: Store, needs: Needs, *, only_current: bool) -> None:
    """Adds what running and resumable steps make and read."""
    for folder in work_folders(store.work):
        work = read_work(folder)
        runs = store.running(folder) is not None
        if not runs and work.keeps_checkpoint and work.artifact_id in needs.artifacts:
            note_kept(store, work, needs)
        if not runs and (only_current or not can_resume(store, work)):
            continue
        needs.works.add(folder.name)
        if not runs and work.artifact_id not in needs.artifacts:
            needs.notes.append(
                f"work {folder.name} can resume and no recorded plan names it: it is kept"
                " (`slipway gc --only-current` lets it go)"
            )
        needs.artifacts |= {work.artifact_id} if work.artifact_id else set()
        needs.artifacts |= set(work.input_ids.values()) | store.artifacts_at(work.inputs.values())


def note_kept(store: Store, work: Work, needs: Needs) -> None:
    """Says what a checkpoint takes that stays although its artifact is made."""
    if work.checkpoints.steps() and store.find(str(work.artifact_id)):
        folder = work.checkpoints.folder
        needs.notes.append(
            f"the last checkpoint of {work.step} is kept, so that it can be extended ({size(size_of(folder))}):"
            f" whoever does not wish that removes {folder}"
        )


def can_resume(store: Store, work: Work) -> bool:
    return work.can_resume() and (work.artifact_id is None or store.find(work.artifact_id) is None)


def made_by(store: Store, recipes: set[str]) -> set[str]:
    """Ids of the artifacts that recipes of these names made."""
    found = set()
    for artifact_id in store.all_ids():
        with contextlib.suppress(SlipwayError):
            if read_manifest(store.artifact_folder(artifact_id)).recipe in recipes:
                found.add(artifact_id)
    return found


def with_lineage(store: Store, ids: Iterable[str]) -> set[str]:
    """The ids and every id that their artifacts were made from, told from manifests and, where these fail, from jobs."""
    jobs = {work.artifact_id: work for work in map(read_work, work_folders(store.work))}
    kept: set[str] = set()
    ahead = list(ids)
    while ahead:
        artifact_id = ahead.pop()
        if artifact_id in kept:
            continue
        kept.add(artifact_id)
        with contextlib.suppress(SlipwayError):
            ahead += read_manifest(store.artifact_folder(artifact_id)).input_ids.values()
        if artifact_id in jobs:
            ahead += jobs[artifact_id].input_ids.values()
    return kept


def collect(store: Store, current: Current, *, dry_run: bool = False, only_current: bool = False) -> list[str]:
    """Removes what is not needed (or with `dry_run` only says so); returns notes, a line per removal and a sum."""
    needs = needs_of(store, current, only_current=only_current)
    lines = list(needs.notes)
    if only_current:
        lines += let_variants_go(store, dry_run=dry_run)
    if dry_run:
        found = [(folder, what, size_of(folder)) for folder, what in unneeded(store, needs)]
        lines += [f"would remove {what}, {size(taken)}" for _, what, taken in found]
        return [*lines, total([taken for _, _, taken in found])]
    restore_needed(store, needs)
    batch = store.folder / "trash" / f"gc-{os.getpid()}-{time.time_ns()}"
    aside = [(set_aside(store, folder, batch), what) for folder, what in list(unneeded(store, needs))]
    again = needs_of(store, lambda path, overrides: set(), only_current=only_current)
    again.artifacts |= needs.artifacts
    freed = []
    for folder, what in aside:
        if isinstance(folder, str):
            lines.append(f"could not remove {what}: {folder}")
        elif is_needed(folder, batch, again):
            put_back(store, folder, batch)
            lines.append(f"kept {what}: a run that has just started needs it")
        else:
            freed.append(size_of(folder))
            drop(folder)
            lines.append(f"removed {what}, {size(freed[-1])}")
    clear(store, batch)
    return [*lines, total(freed)]


def total(freed: list[int]) -> str:
    return f"{len(freed)} {'folder' if len(freed) == 1 else 'folders'}, {size(sum(freed))}"


def unneeded(store: Store, needs: Needs) -> Iterator[tuple[Path, str]]:
    """(folder, what it is) of everything that may go."""
    for folder in filter(is_folder, entries_of(store.artifacts)):
        if is_id(folder.name) and folder.name not in needs.artifacts:
            yield folder, f"artifact {folder.name[:12]} ({step_of(folder)})"
    for folder in work_folders(store.work):
        if folder.name in needs.works:
            continue
        work = read_work(folder)
        if work.artifact_id not in needs.artifacts:
            yield folder, f"work {folder.name}"
        elif work.checkpoints.steps() and store.find(str(work.artifact_id)) and not work.keeps_checkpoint:
            yield work.checkpoints.folder, f"checkpoints of work {folder.name}, whose artifact is made"
    yield from leftovers(store)


def leftovers(store: Store) -> Iterator[tuple[Path, str]]:
    """What a command that was killed had still to delete. Younger ones may be another's that is at work."""
    trash = store.folder / "trash"
    for folder in entries_of(trash):
        since = folder.name.rpartition("-")[2]
        if not since.isdigit() or time.time_ns() - int(since) > LEFTOVER_NANOSECONDS:
            yield folder, f"leftover {folder.name}"


def is_id(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def step_of(folder: Path) -> str:
    try:
        return read_manifest(folder).step
    except SlipwayError:
        return "no readable manifest"


def set_aside(store: Store, folder: Path, batch: Path) -> Path | str:
    """Moves a folder out of sight, to the same place below the batch, which is returned; or why that cannot be.

    A lock goes with its folder: a step that has begun in it meanwhile gets it back at once.
    """
    target = batch / folder.relative_to(store.folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        if folder.parent == store.work and store.running(target):
            target.rename(folder)
            return "it has just been started"
    except OSError as error:
        return error.strerror or str(error)
    return target


def is_needed(moved: Path, batch: Path, needs: Needs) -> bool:
    """Whether what was set aside has come to be needed meanwhile."""
    kind, name, *inside = moved.relative_to(batch).parts
    if kind == "artifacts":
        return name in needs.artifacts
    return kind == "work" and not inside and read_work(moved).artifact_id in needs.artifacts


def put_back(store: Store, moved: Path, batch: Path) -> None:
    """Moves a folder to where it was. Where something stands there by now, that was made anew, and the old one goes."""
    place = store.folder / moved.relative_to(batch)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        moved.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        drop(moved)


def drop(folder: Path) -> None:
    """Removes a folder that another collection may be removing as well."""
    with contextlib.suppress(FileNotFoundError):
        remove(folder)


def restore_needed(store: Store, needs: Needs) -> None:
    """Puts back what a collection that was killed had set aside and had not yet told to be needed."""
    for batch in sorted((store.folder / "trash").glob("gc-*")):
        for moved in sorted([*batch.glob("artifacts/*"), *batch.glob("work/*")]):
            if is_needed(moved, batch, needs):
                put_back(store, moved, batch)


def size_of(folder: Path) -> int:
    """Bytes below the folder; a link takes none."""
    if folder.is_symlink():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def clear(store: Store, batch: Path) -> None:
    """Removes what is left of the batch, and digests of artifacts that are gone."""
    drop(batch)
    with contextlib.suppress(OSError):
        (store.folder / "trash").rmdir()
    forget_gone(store.folder, set(store.all_ids()))


def let_variants_go(store: Store, *, dry_run: bool) -> list[str]:
    """Forgets all plans but the one that each recipe ran last; a line for each."""
    records = store.records()
    newest = {plan.variant for plan in records.newest()}
    old = [plan for plan in records.plans if plan.variant not in newest]
    return [forget_plan(store, plan, dry_run=dry_run) for plan in old if not plan.goes_on]


def forget_plan(store: Store, plan: RecordedPlan, *, dry_run: bool = False) -> str:
    if not dry_run:
        forget(store.recipes, [plan])
    return f"{'would forget' if dry_run else 'forgot'} recipe {plan.label} ({plan.path})"


def forget_recipe(store: Store, recipe: str) -> list[str]:
    """Forgets all plans of a recipe, named as it names itself or by its path; a line for each.

    Raises `StoreError` if there is none, if several recipes have the name, or if one of its plans still runs; `PathError`
    for what can be no path.
    """
    # Unlike `resolve`, this takes a link that leads back to itself: what ran may be forgotten whatever stands there now.
    place = os.path.realpath(expanded(recipe))
    plans = [plan for plan in store.records().plans if recipe == plan.name or plan.path in (recipe, place)]
    paths = sorted({plan.path for plan in plans})
    if not plans:
        known = sorted({plan.name for plan in store.records().plans})
        what = f"no recipe of this name or path ran in {store.folder}"
        raise StoreError(Problem(shown_path(recipe), what, did_you_mean(recipe, known)))
    if len(paths) > 1:
        raise StoreError(Problem(recipe, f"means several recipes: {', '.join(paths)}", "Write the path."))
    if runs := [plan for plan in plans if plan.goes_on]:
        hint = f"Wait for it, or stop it. If its machine is gone, remove {file_of(store.recipes, runs[0])}."
        raise StoreError(Problem(recipe, f"is being run by {runs[0].process}", hint))
    return [forget_plan(store, plan) for plan in plans]
