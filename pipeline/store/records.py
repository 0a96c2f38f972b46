"""The plans that ran in a store. From them is told what `gc` must keep, what a step's name means, and what changed since.

A recipe is its path: two recipes of one name in different places are two. A run with `--set` is a variant of its recipe and
is remembered beside it, so that its results stay; overrides of resources make no variant, since they change no result. Each
variant has one file with the plan it ran last: `<name>-<digest of the path>.json`, with a second digest where something was
set. A plan that is replaced while its run still goes on stays in the file, below `earlier`, until that run has ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import Problem, StoreError
from pipeline.processes import Identity, this_process
from pipeline.store.artifact import digest_bytes
from pipeline.store.durable import make_folder, read_json, write_json
from pipeline.store.locks import Lock, Taken

NAME_LIMIT = 100
"""Letters of a recipe's name that its file begins with; the whole name stands inside."""


LONGEST_RUN_SECONDS = 30 * 24 * 3600
"""A run on another machine that has not said that it ended counts as going on for so long."""

CHANGING_SECONDS = 30.0
"""How long one waits for others that change records. Each takes milliseconds."""


ArtifactId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recorded(BaseModel):
    """What of a record is read; whatever else stands there is left alone."""

    model_config = ConfigDict(frozen=True, defer_build=True)


class RecordedStep(Recorded):
    """A step as it was planned."""

    artifact_id: ArtifactId
    kind: str = ""
    identity: dict[str, Any] = {}
    folders: list[ArtifactId] = []
    """Artifacts of this store that the step reads by their path."""

    @property
    def ids(self) -> set[str]:
        """The artifact, and what it is made from as far as it has an id."""
        inputs = self.identity.get("inputs")
        return {self.artifact_id, *self.folders, *(inputs.values() if isinstance(inputs, dict) else ())}


class RecordedPlan(Recorded):
    """The plan that a variant of a recipe ran last."""

    name: str
    path: str
    overrides: list[str] = []
    recorded_at: float
    process: Identity | None = None
    """Who runs it; None once it has ended, and for jobs that are started by hand."""
    steps: dict[str, RecordedStep]
    earlier: list[RecordedPlan] = []

    @property
    def variant(self) -> tuple[str, tuple[str, ...]]:
        """The recipe's path, and of what was set that which decides results."""
        return self.path, tuple(override for override in self.overrides if not sets_resources(override))

    @property
    def goes_on(self) -> bool:
        """Whether its run has not ended, as far as that can be told from here."""
        if self.process is None:
            return False
        if self.process.is_here():
            return not self.process.is_dead()
        return time.time() - self.recorded_at < LONGEST_RUN_SECONDS

    @property
    def ids(self) -> set[str]:
        return set().union(*(step.ids for step in self.steps.values()))

    @property
    def label(self) -> str:
        """The recipe's name, with what was set."""
        return " --set ".join([self.name, *self.variant[1]])


@dataclass(frozen=True)
class OddRecord:
    """A file among the records that cannot be read."""

    file: Path
    why: str

    @property
    def recipes(self) -> set[str]:
        """The names that its recipe may have, told from the file's."""
        parts = self.file.stem.split("-")
        return {"-".join(parts[:count]) for count in range(max(1, len(parts) - 2), len(parts) + 1)}

    def __str__(self) -> str:
        return f"{self.file} is left out: {self.why}. Remove it, or run its recipe again"


@dataclass(frozen=True)
class Records:
    """The plans that count, the one that ran last first; replaced ones whose run goes on; and files that cannot be read."""

    plans: list[RecordedPlan]
    replaced: list[RecordedPlan]
    odd: list[OddRecord]

    def newest(self) -> list[RecordedPlan]:
        """Of each recipe the plan that ran last, whatever was set."""
        found: dict[str, RecordedPlan] = {}
        for plan in self.plans:
            found.setdefault(plan.path, plan)
        return list(found.values())


def sets_resources(override: str) -> bool:
    """Whether `--set` of it changes where a step runs, and not what it makes."""
    keys = override.partition("=")[0].strip().split(".")
    return "resources" in (keys[:1] + keys[1:2] if keys[0] != "stages" else keys[2:3])


def file_of(folder: Path, plan: RecordedPlan) -> Path:
    path, overrides = plan.variant
    parts = [plan.name[:NAME_LIMIT], digest_bytes(path.encode())[:8]]
    if overrides:
        parts.append(digest_bytes("\0".join(overrides).encode())[:8])
    return folder / f"{'-'.join(parts)}.json"


def read_record(file: Path) -> RecordedPlan | OddRecord:
    """The record in a file. Older ones lie under the recipe's name alone, and hold no time."""
    try:
        block = read_json(file)
        if isinstance(block, dict) and "recorded_at" not in block:
            block = {"name": file.stem, "recorded_at": file.stat().st_mtime, **block}
        return RecordedPlan.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        return OddRecord(file, f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}")
    except (OSError, ValueError, RecursionError) as error:
        return OddRecord(file, f"it cannot be read ({str(error).splitlines()[0]})")


def record_files(folder: Path) -> list[Path]:
    """The files that records may be: hidden ones and folders are none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))


def read_files(folder: Path) -> Iterator[tuple[Path, RecordedPlan | OddRecord]]:
    for file in record_files(folder):
        yield file, read_record(file)


def read_records(folder: Path) -> Records:
    """Everything that is known of the plans that ran."""
    found = [value for _, value in read_files(folder)]
    plans = sorted((each for each in found if isinstance(each, RecordedPlan)), key=lambda plan: -plan.recorded_at)
    count: dict[object, RecordedPlan] = {}
    replaced = []
    for plan in plans:
        replaced += [each for each in plan.earlier if each.goes_on]
        if count.setdefault(plan.variant, plan) is not plan and plan.goes_on:
            replaced.append(plan)
    return Records(list(count.values()), replaced, [each for each in found if isinstance(each, OddRecord)])


def newest_plan(folder: Path, name: str, path: str) -> RecordedPlan | None:
    """What the recipe ran last; of a recipe that has not run where it lies, what one of its name ran last.

    Reads as few files as it can: a plan must not wait for all variants of all recipes.
    """
    begin = f"{name[:NAME_LIMIT]}-{digest_bytes(path.encode())[:8]}"
    of_name = [
        file for file in record_files(folder) if file.stem == name or file.stem.startswith(f"{name[:NAME_LIMIT]}-")
    ]
    newest_first = sorted(of_name, key=lambda file: (file.stem.startswith(begin), modified(file)), reverse=True)
    fallback = None
    for file in newest_first:
        plan = read_record(file)
        if isinstance(plan, RecordedPlan) and plan.name == name:
            if plan.path == path:
                return plan
            fallback = fallback or plan
    return fallback


def modified(file: Path) -> float:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def record_plan(folder: Path, name: str, entry: Mapping[str, Any], *, running: bool) -> list[str]:
    """Remembers a plan that runs, in place of the one that its variant ran before; returns what the user should know.

    `running` says that this process runs it, until `end_plan`.
    """
    process = this_process() if running else None
    plan = RecordedPlan.model_validate({**entry, "name": name, "recorded_at": time.time(), "process": process})
    make_folder(folder)
    with changing(folder):
        return replace_plan(folder, plan)


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Holds the records while they are read, changed and written, so that no other process's change is lost."""
    deadline = time.monotonic() + CHANGING_SECONDS
    lock = Lock(folder / "changing")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock.held())
                break
            except Taken as taken:
                if time.monotonic() > deadline:
                    hint = f"Try again. {taken}".rstrip()
                    raise StoreError(Problem(str(folder), "is being changed by another process", hint)) from None
                time.sleep(0.01)
        yield


def replace_plan(folder: Path, plan: RecordedPlan) -> list[str]:
    """Writes it in place of what its variant ran before; plans that still go on stay below it."""
    others = list(read_files(folder))
    same = [(file, each) for file, each in others if isinstance(each, RecordedPlan) and each.variant == plan.variant]
    earlier = [each.model_copy(update={"earlier": []}) for _, old in same for each in [old, *old.earlier]]
    going_on = [each for each in earlier if each.goes_on and each.process != plan.process]
    file = file_of(folder, plan)
    write_plan(file, plan.model_copy(update={"earlier": going_on}))
    for old, _ in same:
        if old != file:
            old.unlink(missing_ok=True)
    known = [each for _, each in others if isinstance(each, RecordedPlan)]
    return namesakes(known, plan.name, plan.path) + [str(each) for _, each in others if isinstance(each, OddRecord)]


def namesakes(known: Iterable[RecordedPlan], name: str, path: str) -> list[str]:
    """A sentence if recipes of this name ran from other places."""
    places = sorted({plan.path for plan in known if plan.name == name and plan.path != path})
    if not places:
        return []
    listed = ", ".join(place if Path(place).exists() else f"{place} (which is gone)" for place in places)
    return [f"another recipe named '{name}' ran in this store: {listed}. Both are kept apart, by their paths."]


def end_plan(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Notes that this process no longer runs the plan."""
    process = this_process()
    file = file_of(folder, RecordedPlan.model_validate({**entry, "name": name, "recorded_at": 0.0}))
    with changing(folder):
        plan = read_record(file)
        if isinstance(plan, OddRecord):
            return
        rest = [each for each in plan.earlier if each.process != process]
        update: dict[str, Any] = {"earlier": rest}
        if plan.process == process:
            update["process"] = None
        write_plan(file, plan.model_copy(update=update))


def write_plan(file: Path, plan: RecordedPlan) -> None:
    """Writes the record. The file's time is that of the plan, also where it is written again at its end."""
    write_json(file, plan.model_dump(mode="json"))
    os.utime(file, (plan.recorded_at, plan.recorded_at))


def forget(folder: Path, plans: Iterable[RecordedPlan]) -> None:
    """Removes the records of these variants."""
    variants = {plan.variant for plan in plans}
    for file, plan in read_files(folder):
        if isinstance(plan, RecordedPlan) and plan.variant in variants:
            file.unlink(missing_ok=True)
