"""Marks: what each rank of a job leaves in the work folder about itself, and what can be read from them.

`ranks/<rank>.json` says which process the rank is, how many boundaries (steps, batches, rounds) it has come to, and in
the end how it ended. All ranks come to the same boundaries, so the one that is behind is the one the others wait for. What a
rank does by itself for long gives signs of life, which are news and no boundaries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.processes import Identity, this_process
from pipeline.store.durable import read_json, write_json
from pipeline.store.work_folder import WorkFolder


@dataclass(frozen=True)
class Mark:
    """What a rank last said of itself. `ended` is the status it ended with, or None while it runs."""

    rank: int
    process: Identity
    boundaries: int = 0
    signs: int = 0
    """Signs of life within what the rank does by itself, of which another may give more or none."""
    ended: str | None = None
    is_committing: bool = False
    """Whether its result is whole and is being hashed and put into the store."""

    def is_gone(self) -> bool:
        """Whether its process ended without a word: it was killed, or broke down."""
        return self.ended is None and self.process.is_dead()

    def is_stopped(self) -> bool:
        """Whether its process is held by SIGSTOP or the like."""
        process = self.process.process()
        return process is not None and process.is_stopped


def own_mark(rank: int) -> Mark:
    """The mark of this process at its start."""
    return Mark(rank, this_process())


def write_mark(work: Path, mark: Mark) -> None:
    """Replaces the rank's mark. A full or vanished disk is passed over: the mark is news, not state."""
    with contextlib.suppress(OSError, StoreError):
        write_json(WorkFolder(work).mark(mark.rank), asdict(mark), survives_power_loss=False)


def read_marks(work: Path, size: int) -> dict[int, Mark]:
    """Rank -> mark, of the ranks that have left one."""
    found = {}
    for rank in range(size):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            said = read_json(WorkFolder(work).mark(rank))
            found[rank] = Mark(**{**said, "process": Identity(**said["process"])})
    return found


def behind(marks: dict[int, Mark], size: int) -> list[int]:
    """The ranks that the others wait for: those that are stopped, else have left no mark, else came least far."""
    running = {rank: mark for rank, mark in marks.items() if mark.ended is None}
    if stopped := [rank for rank, mark in running.items() if mark.is_stopped()]:
        return stopped
    if missing := [rank for rank in range(size) if rank not in marks]:
        return missing
    least = min((mark.boundaries for mark in running.values()), default=0)
    return [rank for rank, mark in running.items() if mark.boundaries == least]


def names(ranks: Sequence[int], size: int) -> str:
    """`rank 1`, `ranks 1 and 3`, `ranks 0, 1, 2 and 9 more`, or `any rank`; `the launcher` where no rank is meant."""
    if not ranks:
        return "the launcher"
    if len(ranks) == size and size > 1:
        return "any rank"
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4:
        return f"ranks {', '.join(map(str, ranks[:3]))} and {len(ranks) - 3} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
