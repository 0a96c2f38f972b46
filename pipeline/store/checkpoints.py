"""Checkpoints of a running step. The last file written, `complete.json`, lists the size and digest of all others.

A folder whose list does not verify does not exist for us: it is never resumed from. Old checkpoints are deleted only
after a newer one has verified.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, StoreError
from pipeline.store.artifact import FileEntry, differences, files_below, list_files
from pipeline.store.numbers import json_text

COMPLETE = "complete.json"


PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint that verified (None if none did), and why each newer one was passed over."""

    path: Path | None
    step: int
    passed_over: list[str]


@dataclass(frozen=True)
class Checkpoints:
    """The folder `checkpoint-<step>` per saved training step below `folder`."""

    folder: Path
    keep: int = 2

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step}"

    def steps(self) -> list[int]:
        """The steps that have a folder, complete or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def complete(self, step: int) -> None:
        """Declares the folder of `step` complete: hashes and fsyncs its files, then writes the list. Rank 0 only."""
        folder = self.path(step)
        for path in files_below(folder):
            sync(path)
        temporary = folder / f"{COMPLETE}.tmp"
        entries = {
            name: entry.model_dump() for name, entry in list_files(folder).items() if not name.startswith(COMPLETE)
        }
        temporary.write_text(json_text({"step": step, "files": entries}, COMPLETE, indent=1), encoding="utf-8")
        sync(temporary)
        temporary.replace(folder / COMPLETE)
        sync(folder)
        sync(self.folder)

    def problems(self, step: int, *, hashes: bool = True) -> list[str]:
        """Why the checkpoint of `step` cannot be resumed from; empty if it can. Without `hashes` a look at the sizes."""
        folder = self.path(step)
        try:
            listed = json.loads((folder / COMPLETE).read_bytes())
            files = {name: FileEntry(**entry) for name, entry in listed["files"].items()}
        except FileNotFoundError:
            return [f"{COMPLETE} is missing: it was not written to the end"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return [f"{COMPLETE} cannot be read"]
        return differences(folder, files, hashes=hashes, ignore=frozenset({COMPLETE, f"{COMPLETE}.tmp"}))

    def newest(self, *, hashes: bool = True) -> Newest:
        """The newest checkpoint that verifies."""
        passed_over: list[str] = []
        for step in reversed(self.steps()):
            problems = self.problems(step, hashes=hashes)
            if not problems:
                return Newest(self.path(step), step, passed_over)
            passed_over.append(f"{PREFIX}{step} is not resumed from: {'; '.join(problems[:3])}")
        return Newest(None, 0, passed_over)

    def rotate(self) -> None:
        """Deletes all but the newest `keep` good checkpoints, if the newest one verifies. Rank 0 only.

        Of the older ones only the sizes are compared: hashing them again at every save would cost more than it saves.
        """
        good = [step for step in self.steps() if not self.problems(step, hashes=False)]
        if good and not self.problems(good[-1]):
            for step in self.steps():
                if step < good[-1] and step not in good[-self.keep :]:
                    shutil.rmtree(self.path(step))

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`: they did not verify, and will be written again. Rank 0 only."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))

    def require_room(self, needed_bytes: int) -> None:
        """Raises `StoreError` if the disk cannot take `needed_bytes` more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        require_room(self.folder, needed_bytes, "the next checkpoint")


def require_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises `StoreError` if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StoreError(
            Problem(
                str(folder),
                f"{what} needs {needed_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
                "Free some space (`slipway gc` removes what no recipe needs), then run again: it resumes.",
            )
        )


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
