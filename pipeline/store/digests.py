"""Digests of files and folders from outside, which stand for them in an artifact's id.

They are remembered by path, size and time of change, for all stores together: what lies outside belongs to the machine,
and a plan, which creates no store, must not read it all again. The file `digests.json` with them lies in `$SLIPWAY_CACHE`,
or in `slipway` below `$XDG_CACHE_HOME`, which is `~/.cache` where it is not set. Nothing is lost with it but time.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from pipeline.errors import PathError, Problem
from pipeline.settings.paths import expanded, kind_of_file, unusable
from pipeline.store.artifact import canonical_json, digest_bytes, digest_file
from pipeline.store.durable import read_json, write_json

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


SETTLING_SECONDS = 2.0
"""A file changed this recently may change again within the clock's grain: its digest is not remembered."""


def cache_file() -> Path:
    own, common = os.environ.get("SLIPWAY_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return expanded(own).absolute() / "digests.json"
    try:
        return expanded(Path(common or "~/.cache") / "slipway").absolute() / "digests.json"
    except PathError:
        # A user without a home folder, as in some containers, remembers nothing: below a file nothing can be.
        return Path(os.devnull) / "digests.json"


class Digests:
    """The digests of outside files and folders."""

    def __init__(self, file: Path, *, again: bool = False) -> None:
        self.file = file
        self.again = again
        """Whether to hash everything again, whatever is remembered."""
        self.remembered = read_digests(file)
        self.new: dict[str, list[str]] = {}

    def of(self, path: Path) -> str:
        """`sha256:...` of the content: of a file its bytes, of a folder the names and bytes of the files below it.

        Raises `PathError` where it cannot be read.
        """
        try:
            return self.found(path)
        except OSError as error:
            raise unusable(error.filename or path, error) from None

    def found(self, path: Path) -> str:
        is_folder = path.is_dir()
        stats = outside_files(path) if is_folder else {"": path.stat()}
        seen = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats.items()]
        signature = digest_bytes(canonical_json(seen))
        entry = self.remembered.get(str(path))
        if entry and entry[0] == signature and not self.again:
            return entry[1]
        if is_folder:
            content = {name: digest_file(f"{path}/{name}") for name in stats}
            value = f"sha256:{digest_bytes(canonical_json(content))}"
        else:
            value = f"sha256:{digest_file(path)}"
        if all(time.time() - s.st_mtime > SETTLING_SECONDS for s in stats.values()):
            self.remembered[str(path)] = self.new[str(path)] = [signature, value]
        return value

    def save(self) -> None:
        """Adds what was digested to the file, beside what others wrote to it meanwhile."""
        if not self.new:
            return
        known = {**read_digests(self.file), **self.new}
        # A file that cannot be written costs time at the next plan, and nothing else.
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            entries = {path: entry for path, entry in known.items() if os.path.exists(path)}
            write_json(self.file, entries, survives_power_loss=False)
        self.new = {}


def read_digests(file: Path) -> dict[str, list[str]]:
    """Path -> [signature of sizes and times, digest]; empty where there is no such file."""
    try:
        known = read_json(file)
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 2}


def outside_files(folder: Path) -> dict[str, os.stat_result]:
    """Relative path -> status of the files below an outside folder that count as its content, sorted by path: no caches,
    no installed packages, nothing hidden. Strings, not paths: a folder may hold thousands, and `plan` looks at them all.

    Raises `PathError` for what cannot be read to its end, such as a pipe, and for names that are no text.
    """
    found = {}
    ahead = [(str(folder), "")]
    while ahead:
        directory, prefix = ahead.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    ahead.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_file():
                    found[prefix + require_text(entry)] = entry.stat()
                else:
                    refuse_endless(entry)
    return dict(sorted(found.items()))


def require_text(entry: os.DirEntry[str]) -> str:
    """The name of the entry. Raises `PathError` if it is not UTF-8: it is written down as text in many places."""
    try:
        entry.name.encode()
    except UnicodeError:
        raise PathError(Problem(ascii(entry.path), "has a name that is not UTF-8", "Rename it.")) from None
    return entry.name


def refuse_endless(entry: os.DirEntry[str]) -> None:
    """Raises `PathError` for a pipe, a socket or a device. Links to folders, or to nothing, are no content."""
    try:
        other = kind_of_file(entry.stat())
    except OSError:
        return
    if other:
        raise PathError(Problem(entry.path, f"is {other}, and no part of a data set or model", "Remove it."))
