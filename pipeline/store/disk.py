"""What a disk says when it refuses, told apart from faults of ours and turned into a sentence.

Libraries wrap the refusal, or say it in words of their own: `refusal` knows both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import Problem, SlipwayError, StoreError
from pipeline.figures import size

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_ALLOWED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
BROKEN = frozenset({errno.EIO, errno.ESTALE})
MISPLACED = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EXDEV}
)
"""Says something of the disk only where we wrote: a stage may mean a file of its own by it."""

WORDS = re.compile("|".join(re.escape(os.strerror(number)) for number in sorted({*NO_ROOM, errno.EROFS, errno.EIO})))
WRITERS = re.compile(
    r"PytorchStreamWriter failed|\bunexpected pos \d+ vs \d+|\b\d+ requested and \d+ written|file write failed"
)
"""What torch and numpy say of a write that was cut short; they do not pass on why."""

MAKE_ROOM = "Make room (`slipway gc` removes what no recipe needs), or choose another place with --store or SLIPWAY_STORE; then run again."
CHANGE_RIGHTS = "Change its rights, or choose another place with --store or SLIPWAY_STORE."
MOVE = "Choose another place with --store or SLIPWAY_STORE."

FULL_BYTES = 1 << 18
"""With less than this free, a failure that says nothing of the disk is put down to it all the same."""


def refusal(error: BaseException, where: Path, *, ours: bool = False) -> StoreError | None:
    """`error`, or what it was raised from, as a sentence, if it says that the disk refused; else None.

    `where` is named if the error names no file. `ours` means that we were writing: a file in the way of a folder, or a
    name that is too long, is then the store's as well.
    """
    for link, certain in chain(error):
        if isinstance(link, SlipwayError):
            return None
        problem = problem_of(link, where, ours=ours, certain=certain)
        if problem:
            return StoreError(problem)
    return None


def chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """The error and what it was raised from, each with True; what it was raised while handling, with False: that may
    have been dealt with."""
    ahead: list[tuple[BaseException | None, bool]] = [(error, True)]
    seen = set()
    while ahead:
        link, certain = ahead.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link, certain
        ahead += [(link.__cause__, certain), (None if link.__suppress_context__ else link.__context__, False)]


def problem_of(error: BaseException, where: Path, *, ours: bool, certain: bool) -> Problem | None:
    if isinstance(error, OSError) and error.errno is not None:
        # Of two names, as copying gives, the first was read; where the disk is full, the second is what it refused.
        place = str((error.filename2 if error.errno in NO_ROOM else None) or error.filename or where)
        said = (error.strerror or os.strerror(error.errno)).rstrip(".")
        if error.errno in NO_ROOM:
            return Problem(place, f"cannot be written: {said} ({free_words(where)})", MAKE_ROOM)
        if error.errno in NOT_ALLOWED and certain and (error.filename or error.errno == errno.EROFS):
            return Problem(place, f"cannot be read or written: {said}", CHANGE_RIGHTS)
        if error.errno in BROKEN:
            return Problem(place, f"cannot be read or written: {said}", "Look at this disk before anything else.")
        if ours and error.errno in MISPLACED:
            return Problem(place, f"cannot be written: {said}", MOVE)
    text = str(error)
    if isinstance(error, Exception) and (WORDS.search(text) or WRITERS.search(text)):
        said = "" if WORDS.search(text) else "a file was cut short, "
        what = f"cannot be written: {said}{text.strip().splitlines()[0]} ({free_words(where)})"
        return Problem(str(where), what, MAKE_ROOM)
    return None


def free_bytes(folder: Path) -> int | None:
    """The free bytes of the disk of `folder`, or of what there is above it; None if nobody can say."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def free_files(folder: Path) -> int | None:
    """How many more files the disk of `folder` takes (its free inodes); None where nobody counts them, or can say."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            return found.f_favail if found.f_files else None
    return None


def free_words(folder: Path) -> str:
    free = free_bytes(folder)
    files = ", and no file more has a place" if free_files(folder) == 0 else ""
    return "nobody knows how much is free" if free is None else f"{size(free)} are free{files}"


def is_full(folder: Path) -> bool:
    free = free_bytes(folder)
    return (free is not None and free < FULL_BYTES) or free_files(folder) == 0


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what the disk refuses into a `StoreError`: for every place where the core itself writes."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        refused = refusal(error, where, ours=True)
        if refused is None:
            raise
        raise refused from None
