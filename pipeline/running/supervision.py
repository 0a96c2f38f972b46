"""Looks after the processes of a running step: whose news fails to come, who is gone, and when it is time to end them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.running.lifeline import ranks_below
from pipeline.running.marks import Mark, behind, names, read_marks
from pipeline.store.job import Job

LOOK_SECONDS = 0.5
SAY_AFTER_SECONDS = 60.0
"""Silence that is worth a line; a group that was silent for longer before, and went on, may be silent twice as long."""
SAY_AFTER_STOP_SECONDS = 10.0
GONE_GRACE_SECONDS = 4.0
"""How long the others may live once a rank was killed. They cannot go on, and a launcher would wait half a minute for them."""
FAILED_GRACE_SECONDS = 10.0
"""How long the others may live once a rank ended with an error: they find out for themselves, or never."""
ALONE_GRACE_SECONDS = 60.0
"""How long a process that is alone may take to end once it has said that it failed: a busy machine takes its time."""
STOPPED_GRACE_SECONDS = 6.0
"""How long a group that was asked to stop waits for a rank whose process is stopped."""
STATELESS_GRACE_SECONDS = 6.0
"""How long a stage without state may take to stop: it has nothing to save."""
LONGEST_TICK_SECONDS = 5.0
"""A longer time between two looks is one in which we were suspended ourselves: it says nothing of the ranks."""


@dataclass
class Supervision:
    """The ranks of one job, seen from outside. `look` returns why to end them, if it is time to."""

    job: Job
    stateless: bool
    """Whether the stage has no state to save."""
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    marks: dict[int, Mark] = field(default_factory=dict)
    last_look: float | None = None
    news: object = None
    silent: float = 0.0
    longest: float = 0.0
    """The longest silence after which there was news."""
    said: float = 0.0
    asked_for: float | None = None
    """Seconds since the group was asked to stop."""
    lost_for: float = 0.0
    """Seconds since a rank is known to be lost to the others."""
    held_for: float = 0.0
    """Seconds since a rank's process is stopped."""

    @property
    def size(self) -> int:
        return self.job.resources.world_size

    def look(self, news: object, *, asked: bool) -> str | None:
        """Why the ranks are to be ended, or None. `news` is anything that changes when the step reports progress."""
        now = self.clock()
        if self.last_look is not None and now - self.last_look < LOOK_SECONDS:
            return None
        tick = 0.0 if self.last_look is None else min(now - self.last_look, LONGEST_TICK_SECONDS)
        self.last_look = now
        self.marks = read_marks(self.job.work_folder, self.size)
        self.listen((news, tuple(self.marks.items())), tick)
        self.marks |= self.stopped_early()
        if asked:
            if self.asked_for is None:
                self.asked_for, self.silent, self.said = 0.0, 0.0, 0.0
            else:
                self.asked_for += tick
        self.held_for = self.held_for + tick if self.is_held else 0.0
        return self.lost(tick) or self.stopping() or self.hanging()

    def stopped_early(self) -> dict[int, Mark]:
        """What stands for the marks of ranks whose processes, here, were stopped before they left one."""
        if len(self.marks) == self.size:
            return {}
        ranks = ranks_below(os.getpid(), self.job.work)
        stopped = {rank: process for rank, process in ranks.items() if process.is_stopped}
        return {rank: Mark(rank, process.identity()) for rank, process in stopped.items() if rank not in self.marks}

    @property
    def is_held(self) -> bool:
        """Whether the process of a rank is stopped."""
        return any(mark.is_stopped() for mark in self.marks.values())

    def listen(self, news: object, tick: float) -> None:
        """Counts the silence."""
        if news != self.news:
            self.news = news
            self.longest = max(self.longest, self.silent)
            self.silent = self.said = 0.0
        else:
            self.silent += tick

    def lost(self, tick: float) -> str | None:
        """A rank that was killed, or failed, while others wait for it."""
        gone = [rank for rank, mark in self.marks.items() if mark.is_gone()]
        failed = [rank for rank, mark in self.marks.items() if mark.ended in ("crash", "user_error")]
        self.lost_for = self.lost_for + tick if gone or failed else 0.0
        if gone and self.lost_for >= GONE_GRACE_SECONDS:
            return self.broken(gone)
        if failed and self.size > 1 and self.lost_for >= FAILED_GRACE_SECONDS:
            return f"{names(failed, self.size)} failed: the others are ended"
        if failed and self.lost_for >= ALONE_GRACE_SECONDS:
            return f"the process has failed, and does not end by itself within {ALONE_GRACE_SECONDS:.0f} s: it is ended"
        return None

    def broken(self, gone: Sequence[int]) -> str:
        """The sentence on ranks whose processes are gone."""
        pids = ", ".join(str(self.marks[rank].process.pid) for rank in gone[:3]) + (", ..." if len(gone) > 3 else "")
        if len(gone) == self.size > 1:
            return f"all ranks, or their launcher, were killed or broke down (processes {pids})"
        others = ": the others are ended" if self.size > 1 else ""
        was, processes = ("was", "process") if len(gone) == 1 else ("were", "processes")
        return f"{names(gone, self.size)} {was} killed or broke down ({processes} {pids}){others}"

    def stopping(self) -> str | None:
        """A group that was asked to stop, and does not."""
        if self.asked_for is None:
            return None
        if any(mark.is_committing and mark.ended is None and not mark.is_stopped() for mark in self.marks.values()):
            return None
        if self.stateless:
            return self.overdue("the step was asked to stop", STATELESS_GRACE_SECONDS, self.asked_for)
        limit: float | None = self.job.resources.stop_timeout_seconds
        if self.is_held:
            limit = STOPPED_GRACE_SECONDS if limit is None else min(limit, STOPPED_GRACE_SECONDS)
        elif self.silent >= max(SAY_AFTER_STOP_SECONDS, 2 * self.said):
            self.report(f"waiting for {self.who()} to stop: no news", self.silent, limit)
        return self.overdue("the step was asked to stop", limit, self.silent)

    def hanging(self) -> str | None:
        """A group, or a process that is stopped, from which there is no news."""
        if self.asked_for is not None or (self.size == 1 and not self.is_held):
            return None
        limit, seconds = self.job.resources.hang_timeout_seconds, self.silent
        if self.is_held:
            limits = [each for each in (limit, self.job.resources.stopped_timeout_seconds) if each is not None]
            limit, seconds = min(limits, default=None), self.held_for
        worth_saying = max(2 * self.said, 2 * self.longest, SAY_AFTER_SECONDS)
        if seconds >= (min(worth_saying, limit / 3) if limit and not self.said else worth_saying):
            self.report(f"no news from {self.who()}", seconds, limit)
        return self.overdue("", limit, seconds)

    def report(self, sentence: str, seconds: float, limit: float | None) -> None:
        self.said = seconds
        end = "" if limit is None else f"; the step will be ended after {limit:.0f} s"
        self.say(f"{sentence} for {seconds:.0f} s{end}")

    def overdue(self, before: str, limit: float | None, seconds: float) -> str | None:
        if limit is None or seconds < limit:
            return None
        silence = f"no news from {self.who()} for {seconds:.0f} s: the step is ended"
        return f"{before}; {silence}" if before else silence

    def who(self) -> str:
        """The ranks that the others wait for, and what their processes are."""
        late = behind(self.marks, self.size)
        stopped = [
            self.marks[rank].process.pid for rank in late if rank in self.marks and self.marks[rank].is_stopped()
        ]
        if stopped:
            return (
                f"{names(late, self.size)} (process {stopped[0]} is stopped; `kill -CONT {stopped[0]}` lets it go on)"
            )
        pids = [self.marks[rank].process.pid for rank in late if rank in self.marks]
        return f"{names(late, self.size)}{f' (process {pids[0]})' if len(pids) == 1 else ''}"

    def not_saved(self) -> list[int]:
        """The ranks that did not report a clean save."""
        marks = read_marks(self.job.work_folder, self.size)
        return [rank for rank in range(self.size) if rank not in marks or marks[rank].ended != "preempted"]
