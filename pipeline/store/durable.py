"""The one way in which this project writes what a crash must leave whole or not there at all.

What is written appears by one rename: a temporary file or folder beside it, flushed to the disk, renamed, and the folder
that holds it flushed as well. Without the last, a machine that loses power may forget the name; without the first, it may
remember the name of a file that is empty. Whoever makes a folder flushes the one above (`make_folder`), so that all folders
on the way are safe before something in them counts.

`survives_power_loss=False` leaves the flushing out, for what is worthless after the machine has gone down: processes that
meet, who runs a step, digests that can be computed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import Problem, StoreError
from pipeline.figures import size
from pipeline.store.numbers import json_text

TEMPORARY = ".tmp"


def sync(path: Path | str) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself after them."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(f"{directory}/{name}")
        sync(directory)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it that are missing, such that a power loss forgets none of them."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def beside(path: Path) -> Path:
    """A name that nobody else uses, in the same folder; the processes of several machines may write at once."""
    return path.with_name(f"{path.name}.{os.urandom(4).hex()}{TEMPORARY}")


@contextlib.contextmanager
def replacing(path: Path, *, survives_power_loss: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends; if the block fails, nothing is left of it."""
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if survives_power_loss:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if survives_power_loss:
        sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` when the block ends; if the block fails, nothing is left of it.

    A folder of that name is removed first: it was wrong, or nobody would make it anew.
    """
    temporary = beside(folder)
    make_folder(temporary)
    try:
        yield temporary
        sync_below(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def write_text(path: Path, text: str, *, survives_power_loss: bool = True) -> None:
    """Writes the file as a whole or not at all."""
    with replacing(path, survives_power_loss=survives_power_loss) as file:
        # Names of files may hold what is no text; in JSON the escape stands for the same again.
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any, *, survives_power_loss: bool = True) -> None:
    """Writes the file as a whole or not at all."""
    text = json_text(value, path.name, indent=1)
    write_text(path, text + "\n", survives_power_loss=survives_power_loss)


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises `OSError` for anything else, without waiting for a writer of a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `OSError` where it cannot be read, and `ValueError` for whatever is wrong in it."""
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def require_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises `StoreError` if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StoreError(
            Problem(
                str(folder),
                f"{what} needs {size(needed_bytes)} and {size(free)} are free",
                "Make room (`slipway gc` removes what no recipe needs), then run again: it goes on from its newest checkpoint, if it has one.",
            )
        )


def let_others_read(folder: Path) -> None:
    """Gives the files below it the rights that new files have; safetensors, for one, writes files for their owner alone."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    umask = next((int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:")), 0o077)
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode | (0o666 & ~umask) != mode:
            path.chmod(stat.S_IMODE(mode) | (0o666 & ~umask))
