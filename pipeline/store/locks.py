"""Who runs a step: a lock that one process holds, and that others can ask about without ever taking it.

On most file systems it is a lock of the kernel's on a file (an open-file-description lock): it ends with its process, and
asking for its holder locks nothing. Where the file system knows no such locks, and where `$SLIPWAY_LOCKS` is `files`
because it knows them on each machine for itself only, it is a numbered file that names its owner:

- To take it, one creates the file with the number after the highest, which can succeed only once; a higher one that
  appeared meanwhile wins. Lower ones are removed only once a higher one stands, so no number is taken twice.
- It is free if there is none, or if the owner of the highest gave it back or is known to be dead. Giving back replaces the
  content and leaves the number: somebody may just have found its owner gone, and takes the next.
- Of an owner on another machine nobody can know; the message names the file to remove.

A process that holds either kind has looked at the other as well, after it took its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import Problem, StoreError
from pipeline.processes import Identity, this_process
from pipeline.store.durable import read_json

UNSUPPORTED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
KINDS = ("kernel", "files")
BEING_WRITTEN_SECONDS = 60.0
"""A numbered file without a readable owner is held while it is younger than this: its owner has just created it."""

FLOCK = "hhqqi4x"
"""`struct flock` of 64-bit Linux: type, whence, start, length, process."""


class Taken(Exception):
    """Another process holds the lock. Its text says what to do if that process has died where nobody can see it."""


@dataclass(frozen=True)
class Lock:
    """The lock whose kernel file is `path`; the numbered files stand beside it."""

    path: Path
    kind: str = ""
    """`kernel` or `files`; empty for `$SLIPWAY_LOCKS`, which is `kernel` where it is not set."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock. Raises `Taken` at once if another process does."""
        kind = self.kind or os.environ.get("SLIPWAY_LOCKS") or KINDS[0]
        if kind not in KINDS:
            raise StoreError(Problem("SLIPWAY_LOCKS", f"is {kind!r}", f"It may be {' or '.join(KINDS)}, or not set."))
        descriptor = self.take_kernel_lock() if kind == "kernel" else None
        if descriptor is None:
            number = self.take_numbered_file()
            if self.kernel_lock_is_held():
                self.give_back(number)
                raise self.taken()
            try:
                yield
            finally:
                self.give_back(number)
            return
        try:
            if self.holder() is not None:
                raise self.taken()
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether a process holds the lock, or may hold it. Takes nothing."""
        return self.kernel_lock_is_held() or self.holder() is not None

    def taken(self) -> Taken:
        holder = self.holder()
        if holder is None or (holder[1] and holder[1].is_here()):
            return Taken()
        return Taken(f"If it died with its machine, remove {self.numbered(holder[0])}.")

    # The kernel's lock

    def take_kernel_lock(self) -> int | None:
        """The descriptor that holds the lock while it is open; None where there are no such locks."""
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self.taken() from None
            if error.errno in UNSUPPORTED:
                return None
            raise

    def kernel_lock_is_held(self) -> bool:
        if not hasattr(fcntl, "F_OFD_GETLK"):
            return False
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
            return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    # Numbered files

    def numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}-{number}")

    def numbers(self) -> list[int]:
        """The numbers of the files that stand there, ascending."""
        prefix = f"{self.path.name}-"
        try:
            names = os.listdir(self.path.parent)
        except OSError:
            return []
        return sorted(
            int(name[len(prefix) :]) for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()
        )

    def holder(self) -> tuple[int, Identity | None] | None:
        """(number, owner) of the file that is held; None if the lock is free. The owner is None while it is being written."""
        numbers = self.numbers()
        if not numbers:
            return None
        path = self.numbered(numbers[-1])
        try:
            content = read_json(path)
            owner = Identity(**content["owner"]) if content["owner"] else None
        except (OSError, ValueError, TypeError, KeyError):
            with contextlib.suppress(OSError):
                return (numbers[-1], None) if time.time() - path.stat().st_mtime < BEING_WRITTEN_SECONDS else None
            return self.holder() if self.numbers() != numbers else None
        return None if owner is None or owner.is_dead() else (numbers[-1], owner)

    def take_numbered_file(self) -> int:
        before = self.numbers()
        if self.holder() is not None:
            raise self.taken()
        # After what was there before asking: whoever asked at the same time tries the same number.
        number = before[-1] + 1 if before else 1
        try:
            descriptor = os.open(self.numbered(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise self.taken() from None
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"owner": asdict(this_process())}, file)
            numbers = self.numbers()
            if numbers[-1] != number:
                raise self.taken()
        except BaseException:
            self.numbered(number).unlink(missing_ok=True)
            raise
        for lower in numbers[:-1]:
            self.numbered(lower).unlink(missing_ok=True)
        return number

    def give_back(self, number: int) -> None:
        """Writes over the owner in place: it takes no room, and the disk may be full."""
        with contextlib.suppress(OSError), self.numbered(number).open("r+b") as file:
            length = os.fstat(file.fileno()).st_size
            file.write(json.dumps({"owner": None}).encode().ljust(length))
