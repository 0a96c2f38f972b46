"""Paths from outside, looked up such that every way in which one can be wrong is a sentence, and none a wait.

What is read must be a regular file: opening a pipe waits for a writer, and a device may never end.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import stat
from collections.abc import Iterable, Iterator
from glob import has_magic
from pathlib import Path
from typing import Any

from pipeline.errors import PathError, Problem, shown, shown_path

SENTENCES = {
    errno.ENAMETOOLONG: ("is longer than a path can be", "Shorten it."),
    errno.ELOOP: ("is a symbolic link that leads back to itself", "Mend the link."),
    errno.EACCES: ("may not be read by this user", "Change its permissions, or name another place."),
    errno.EPERM: ("may not be read by this user", "Change its permissions, or name another place."),
    errno.ENOENT: ("is not there", "Correct the path."),
    errno.ENOTDIR: ("lies below a file, which is no folder", "Correct the path."),
    errno.EISDIR: ("is a folder, and a file is needed", "Name the file in it."),
}
"""What an error number of the system means for a path, and what to do."""


READABLE_JSON_BYTES = 64 << 20
"""Of a JSON file that describes something. The largest of their kind, weights' indices, have a few million."""


MOST_ENTRIES = 1_000_000
"""Files and folders that one pattern looks at: a few seconds' worth. More would be a disk, and not a data set."""


KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def unusable(path: Path | str, error: OSError) -> PathError:
    """The error of the system as a sentence."""
    what, hint = SENTENCES.get(error.errno or 0, (f"cannot be used: {error.strerror or error}", "Check the path."))
    return PathError(Problem(shown_path(path), what, hint))


def expanded(name: Path | str) -> Path:
    """The path with `~` replaced. Raises `PathError` for what no file of ours can be called."""
    text = str(name)
    if "\0" in text:
        raise PathError(Problem(shown(text), "holds a NUL character, which no path can", "Remove it."))
    try:
        text.encode()
    except UnicodeError:
        raise PathError(Problem(shown(text), "is not text in UTF-8", "Rename the file or folder.")) from None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        what = f"nobody's home folder is known as {shown(user, quoted=False)}"
        raise PathError(Problem(shown_path(text), what, "Write the path in full.")) from None


def status(path: Path | str) -> os.stat_result | None:
    """The status of what the path leads to, None if nothing is there. Raises `PathError` if that cannot be told."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable(path, error) from None


def is_file(path: Path | str) -> bool:
    """Whether a regular file is there; no pipe, no device."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def nearest_there(path: Path) -> Path:
    """The absolute path itself, or the innermost folder or file on the way to it that is there."""
    return next(place for place in (path, *path.parents) if status(place) is not None)


def holds_file(folder: Path, name: str) -> bool:
    """Whether it is a folder that holds this regular file; also what cannot be a path is none."""
    try:
        return is_file(folder / name)
    except (PathError, ValueError):
        return False


def kind_of_file(found: os.stat_result) -> str | None:
    """What it is if it is neither a regular file nor a folder: `a pipe`, `a socket` or `a device`."""
    return KINDS.get(stat.S_IFMT(found.st_mode))


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file, opened without waiting (an `opener` of `open`). Raises `PathError` for another."""
    # Without O_NONBLOCK, opening a pipe waits for someone who writes to it.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor
    os.close(descriptor)
    what = f"is {kind_of_file(found) or 'a folder'}, and a file is needed"
    raise PathError(Problem(shown_path(path), what, "Name a file."))


def read_file(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file. Raises `PathError` where it cannot be read, is no file, or is larger."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most_bytes + 1) if size <= most_bytes else b""
    except OSError as error:
        raise unusable(path, error) from None
    if max(size, len(content)) > most_bytes:
        what = f"has {max(size, len(content)):,} bytes, and {most_bytes:,} are the most that is read"
        raise PathError(Problem(shown_path(path), what, "Name a smaller file."))
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `PathError` where it cannot be read, or is no JSON object."""
    content = read_file(path, READABLE_JSON_BYTES)
    where, hint = shown_path(path), "Write it again with what made it."
    try:
        block = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PathError(Problem(where, f"is not JSON: {error}", hint)) from None
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"
        raise PathError(Problem(where, what, hint)) from None
    if not isinstance(block, dict):
        raise PathError(Problem(where, "is not a JSON object", hint))
    return block


def matching(pattern: Path) -> list[str]:
    """The files and folders that match an absolute pattern, sorted. `**` is any number of folders.

    As `glob` finds them, but each folder is looked into once at each part of the pattern, however many links lead to it:
    links that lead upwards make no endless paths. Raises `PathError` where a folder cannot be read, or for too many.
    """
    found: Iterable[str] = [pattern.anchor]
    left = [MOST_ENTRIES]
    for part in pattern.parts[1:]:
        if part == "**":
            found = below(found, left)
        elif has_magic(part):
            found = [path for folder in once(found, set()) for path in named(folder, part, left)]
        else:
            found = [path for path in (os.path.join(folder, part) for folder in once(found, set())) if status(path)]
    return sorted(set(found))


def once(paths: Iterable[str], seen: set[tuple[int, int]]) -> Iterator[str]:
    """The folders among the paths that were not seen before, each under the first of its names."""
    for path in paths:
        try:
            found = os.stat(path)
        except OSError as error:
            # Among what a pattern matches, a link that leads nowhere is no folder.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                continue
            raise unusable(path, error) from None
        if stat.S_ISDIR(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            yield path


def below(folders: Iterable[str], left: list[int]) -> list[str]:
    """The folders, and all that is not hidden below them."""
    found = list(folders)
    ahead = found[::-1]
    seen: set[tuple[int, int]] = set()
    while ahead:
        for folder in once([ahead.pop()], seen):
            inside = named(folder, "*", left)
            found += inside
            ahead += reversed(inside)
    return found


def named(folder: str, pattern: str, left: list[int]) -> list[str]:
    """What in the folder has a name that matches; hidden names only match patterns that begin with a dot."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unusable(folder, error) from None
    left[0] -= len(names)
    if left[0] < 0:
        what = f"a pattern that looks at more than {MOST_ENTRIES:,} files and folders stops here"
        raise PathError(Problem(shown_path(folder), what, "Write a narrower pattern."))
    visible = names if pattern.startswith(".") else [name for name in names if not name.startswith(".")]
    return [os.path.join(folder, name) for name in fnmatch.filter(visible, pattern)]
