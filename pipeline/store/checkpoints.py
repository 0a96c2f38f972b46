"""Checkpoints of a running step. The last file written, `complete.json`, lists the size and digest of all others.

A folder whose list does not verify does not exist for us: it is never resumed from. Nor is one that needs another
checkpoint, as that of the best weights so far, which is gone. Old checkpoints are deleted only after a newer one is whole on
the disk: everything in it and every folder on the way is flushed before the list is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store.artifact import FileEntry, differences, digest_file, files_below, list_files
from pipeline.store.durable import make_folder, read_json, require_room, sync, sync_below, write_json
from pipeline.store.resumable import read_saved

COMPLETE = "complete.json"


PREFIX = "checkpoint-"


Seen = dict[str, tuple[int, int, int, int]]
"""Name of a file -> size, times of change and inode."""


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
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a checkpoint says of the libraries and the machine that wrote it."""
    hashed: dict[int, Seen] = field(default_factory=dict, compare=False, repr=False)
    """What the files of a step looked like when this process last hashed them, and found or made their list right."""

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step}"

    def steps(self) -> list[int]:
        """The steps that have a folder, complete or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def complete(self, step: int) -> None:
        """Declares the folder of `step` complete: hashes and flushes all that is in it, then writes the list. Rank 0 only."""
        folder = self.path(step)
        make_folder(folder)
        seen = self.look(step)
        entries = {
            name: entry.model_dump() for name, entry in list_files(folder).items() if not name.startswith(COMPLETE)
        }
        sync_below(folder)
        sync(self.folder)
        # Whoever trains may have made it, and not flushed the folder above.
        sync(self.folder.parent)
        write_json(folder / COMPLETE, {"step": step, "environment": dict(self.environment), "files": entries})
        self.hashed[step] = seen

    def look(self, step: int) -> Seen:
        """What can be seen of the files of `step` without reading them: it changes with their content."""
        folder = self.path(step)
        paths = [path for path in files_below(folder) if not path.name.startswith(COMPLETE)]
        stats = {path.relative_to(folder).as_posix(): path.lstat() for path in paths}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats.items()}

    def problems(self, step: int, *, hashes: bool = True) -> list[str]:
        """Why the checkpoint of `step` cannot be resumed from; empty if it can. Without `hashes` a look at the sizes."""
        found = self.own_problems(step, hashes=hashes)
        if found:
            return found
        for other in self.needs(step):
            if other != step and (missing := self.own_problems(other, hashes=hashes)):
                found.append(f"it needs {PREFIX}{other}: {missing[0]}")
        return found

    def needs(self, step: int) -> tuple[int, ...]:
        """The steps of the other checkpoints that the one of `step` needs."""
        return read_saved(self.path(step)).needs

    def own_problems(self, step: int, *, hashes: bool = True) -> list[str]:
        """The same, of its own files alone."""
        folder = self.path(step)
        try:
            listed = read_json(folder / COMPLETE)
            files = {name: FileEntry(**entry) for name, entry in listed["files"].items()}
        except FileNotFoundError:
            return [f"{COMPLETE} is missing: it was not written to the end"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return [f"{COMPLETE} cannot be read"]
        try:
            seen = self.look(step)
            found = differences(folder, files, digest=digest_file if hashes else None)
        except OSError as error:
            return [f"it cannot be read: {error}"]
        if hashes and not found:
            self.hashed[step] = seen
        return found

    def environment_of(self, step: int) -> dict[str, str]:
        """What the checkpoint of `step` says of the libraries and the machine that wrote it."""
        try:
            said = read_json(self.path(step) / COMPLETE).get("environment", {})
            return {str(name): str(value) for name, value in said.items()}
        except (OSError, ValueError, AttributeError):
            return {}

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
        """Deletes all but the newest `keep` good checkpoints and those that they need, if the newest one is sure to be whole.

        It is if its files look as they did when this process hashed them; else they are hashed. Of the older ones only
        the sizes are compared. Rank 0 only.
        """
        good = [step for step in self.steps() if not self.problems(step, hashes=False)]
        if good and (self.look(good[-1]) == self.hashed.get(good[-1]) or not self.problems(good[-1])):
            kept = set(good[-self.keep :])
            kept |= {needed for step in kept for needed in self.needs(step)}
            for step in self.steps():
                if step < good[-1] and step not in kept:
                    shutil.rmtree(self.path(step))

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`: they did not verify, and will be written again. Rank 0 only."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))

    def require_room(self, needed_bytes: int) -> None:
        """Raises `StoreError` if the disk cannot take `needed_bytes` more."""
        make_folder(self.folder)
        require_room(self.folder, needed_bytes, "the next checkpoint")
