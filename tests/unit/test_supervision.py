"""Who is silent, stopped, killed or behind, and when the group is ended: by a clock of the test's, with marks in files.

The ranks' processes are real ones that sleep: whether they live or are stopped is asked of Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.processes import Identity, identity_of, this_process
from pipeline.running.lifeline import WORKER
from pipeline.running.marks import Mark, behind, names, read_marks, write_mark
from pipeline.running.supervision import Supervision
from pipeline.settings.strict import CHECKOUT
from pipeline.store.work_folder import WorkFolder
from tests.unit.test_launchers import job


@dataclass
class World:
    """A group of two ranks under supervision, and a clock."""

    work: Path
    ranks: list[subprocess.Popen[bytes]]
    said: list[str] = field(default_factory=list)
    now: float = 0.0
    news: int = 0

    def supervision(self, stateless: bool = False, **resources: Any) -> Supervision:
        size = {"launcher": "torchrun", "processes": len(self.ranks)}
        return Supervision(job(self.work, **size, **resources), stateless, self.said.append, clock=lambda: self.now)

    def mark(self, rank: int, **changes: Any) -> Mark:
        mark = replace(Mark(rank, identity_of(self.ranks[rank].pid)), **changes)
        write_mark(self.work, mark)
        return mark

    def leave_one(self) -> None:
        """Makes it a job of one process."""
        with self.ranks.pop() as other:
            other.kill()

    def wait(self, supervision: Supervision, seconds: float, asked: bool = False) -> str | None:
        """What the supervision says first while so many seconds pass, a look every half second."""
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            if reason := supervision.look(self.news, asked=asked):
                return reason
        return None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    WorkFolder(tmp_path).begin()
    ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) for _ in range(2)]
    yield World(tmp_path, ranks)
    for rank in ranks:
        rank.kill()
        rank.wait()


def test_the_rank_that_is_behind_is_named_and_the_group_ended_after_the_stated_time(world: World) -> None:
    """Rank 1 came to boundary 7 and rank 0 to 8, where it waits. It looks twice a second: a third of 100 s is over at 33.5 s."""
    world.mark(0, boundaries=8)
    world.mark(1, boundaries=7)
    pid = world.ranks[1].pid
    reason = world.wait(world.supervision(hang_timeout_seconds=100), 200)
    assert reason == f"no news from rank 1 (process {pid}) for 100 s: the step is ended"
    assert world.now == pytest.approx(100.5)
    assert [line.partition(";")[0] for line in world.said] == [
        f"no news from rank 1 (process {pid}) for 34 s",
        f"no news from rank 1 (process {pid}) for 67 s",
    ]


@pytest.mark.parametrize("news", ["journal", "mark"])
def test_news_ends_the_silence(world: World, news: str) -> None:
    supervision = world.supervision(hang_timeout_seconds=100)
    world.mark(0, boundaries=8)
    world.mark(1, boundaries=8)
    for count in range(4):
        assert world.wait(supervision, 98) is None
        world.news += news == "journal"
        world.mark(1, boundaries=9 + (count if news == "mark" else 0))
    assert world.wait(supervision, 102) is not None


@pytest.mark.slow
def test_without_a_limit_it_is_only_said_and_ever_more_seldom(world: World) -> None:
    """At 60, 120, 240, 480 and 960 s of the first thousand."""
    world.mark(0)
    world.mark(1)
    assert world.wait(world.supervision(hang_timeout_seconds=None), 1000) is None
    assert [line.split()[-2] for line in world.said] == ["60", "120", "240", "480", "960"]
    assert world.said[0] == "no news from any rank for 60 s"


def test_a_stopped_process_is_named_whatever_the_marks_say(world: World) -> None:
    world.mark(0, boundaries=7)
    world.mark(1, boundaries=8)
    pid = world.ranks[1].pid
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    reason = world.wait(world.supervision(hang_timeout_seconds=30), 60)
    assert reason is not None
    assert reason.startswith(
        f"no news from rank 1 (process {pid} is stopped; `kill -CONT {pid}` lets it go on) for 30 s"
    )


def test_a_stopped_process_is_waited_for_less_long_than_a_silent_one(world: World) -> None:
    """What counts is how long it is stopped, whatever it was silent before; one that goes on in time is not ended."""
    world.mark(0, boundaries=7)
    world.mark(1, boundaries=8)
    supervision = world.supervision(hang_timeout_seconds=1800, stopped_timeout_seconds=20)
    assert world.wait(supervision, 50) is None
    pid = world.ranks[0].pid
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert world.wait(supervision, 15) is None
    assert world.said[-1].endswith("for 7 s; the step will be ended after 20 s")
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, os.WCONTINUED)
    assert world.wait(supervision, 15) is None
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    started = world.now
    assert (world.wait(supervision, 60) or "").endswith("for 20 s: the step is ended")
    assert world.now - started == pytest.approx(20)


def test_without_a_limit_a_stopped_process_is_only_said(world: World) -> None:
    world.mark(0)
    world.mark(1)
    os.kill(world.ranks[0].pid, signal.SIGSTOP)
    os.waitpid(world.ranks[0].pid, os.WUNTRACED)
    never = world.supervision(hang_timeout_seconds=None, stopped_timeout_seconds=None)
    assert world.wait(never, 500) is None
    assert "is stopped" in world.said[0]


def test_a_rank_that_never_came_is_named(world: World) -> None:
    world.mark(0)
    assert (
        world.wait(world.supervision(hang_timeout_seconds=30), 60) == "no news from rank 1 for 30 s: the step is ended"
    )


def test_a_single_process_may_be_silent_for_as_long_as_it_works(world: World) -> None:
    """It waits for nobody; a tokenizer is trained for hours without a word. Stopped for good, it is ended."""
    world.leave_one()
    world.mark(0)
    supervision = world.supervision(hang_timeout_seconds=30)
    assert world.wait(supervision, 600) is None
    assert world.said == []
    os.kill(world.ranks[0].pid, signal.SIGSTOP)
    os.waitpid(world.ranks[0].pid, os.WUNTRACED)
    stopped_at = world.now
    assert "is stopped" in (world.wait(supervision, 60) or "")
    assert world.now - stopped_at == pytest.approx(30), "not for what it was silent before"


def test_the_others_are_ended_soon_after_a_rank_was_killed(world: World) -> None:
    world.mark(0)
    killed = world.mark(1)
    world.ranks[1].kill()
    world.ranks[1].wait()
    reason = world.wait(world.supervision(), 30)
    assert reason == f"rank 1 was killed or broke down (process {killed.process.pid}): the others are ended"


def test_of_ranks_that_are_all_gone_the_launcher_may_have_been_killed(world: World) -> None:
    numbers = [world.mark(rank).process.pid for rank in range(2)]
    for rank in world.ranks[:2]:
        rank.kill()
        rank.wait()
    reason = world.wait(world.supervision(), 30)
    assert reason == f"all ranks, or their launcher, were killed or broke down (processes {numbers[0]}, {numbers[1]})"
    assert world.now <= 6


@pytest.mark.parametrize(
    ("status", "seconds"), [("crash", 11), ("user_error", 11), ("done", None), ("preempted", None)]
)
def test_a_rank_may_end_before_the_others_unless_it_failed(world: World, status: str, seconds: float | None) -> None:
    """Rank 0 is at its last file for long after the others are done or have saved."""
    world.mark(0)
    world.mark(1, ended=status)
    world.ranks[1].kill()
    world.ranks[1].wait()
    reason = world.wait(world.supervision(), 300)
    assert (reason is None) == (seconds is None)
    assert seconds is None or world.now <= seconds


@pytest.mark.slow
def test_a_group_that_does_not_save_when_asked_is_ended_after_the_stated_time(world: World) -> None:
    world.mark(0, boundaries=4)
    world.mark(1, boundaries=3)
    supervision = world.supervision(stop_timeout_seconds=40)
    assert world.wait(supervision, 1000) is None
    world.said.clear()
    reason = world.wait(supervision, 100, asked=True)
    pid = world.ranks[1].pid
    assert reason == f"the step was asked to stop; no news from rank 1 (process {pid}) for 40 s: the step is ended"
    expected = f"waiting for rank 1 (process {pid}) to stop: no news for 10 s; the step will be ended after 40 s"
    assert world.said[0] == expected


def test_a_launcher_that_takes_its_time_after_all_ranks_have_saved_is_waited_for_by_name(world: World) -> None:
    world.mark(0, ended="preempted")
    world.mark(1, ended="preempted")
    supervision = world.supervision(stop_timeout_seconds=40)
    assert world.wait(supervision, 30, asked=True) is None
    assert world.said[0] == "waiting for the launcher to stop: no news for 10 s; the step will be ended after 40 s"
    assert supervision.not_saved() == []


def test_a_group_with_a_stopped_rank_is_not_waited_for_when_asked_to_stop(world: World) -> None:
    world.mark(0)
    world.mark(1)
    os.kill(world.ranks[1].pid, signal.SIGSTOP)
    os.waitpid(world.ranks[1].pid, os.WUNTRACED)
    assert "is stopped" in (world.wait(world.supervision(stop_timeout_seconds=None), 12, asked=True) or "")


@contextlib.contextmanager
def started_worker(work: Path, *, rank: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real worker, stopped before its first line."""
    command = [sys.executable, "-u", "-m", WORKER, str(work)]
    process = subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_was_stopped_before_it_left_a_mark_is_not_waited_for_either(world: World) -> None:
    world.mark(0)
    supervision = world.supervision(stop_timeout_seconds=600)
    assert world.wait(supervision, 5) is None
    with started_worker(world.work, rank=1) as early:
        asked_at = world.now
        said = (
            f"the step was asked to stop; no news from rank 1 (process {early.pid} is stopped; `kill -CONT {early.pid}`"
        )
        assert (world.wait(supervision, 12, asked=True) or "").startswith(said)
        assert world.now - asked_at == pytest.approx(6.5)
        assert supervision.not_saved() == [0, 1]
        os.kill(early.pid, signal.SIGCONT)
    assert world.wait(world.supervision(stop_timeout_seconds=600), 12, asked=True) is None


def test_a_rank_alone_that_was_stopped_before_it_left_a_mark_is_held(world: World, tmp_path: Path) -> None:
    world.leave_one()
    with started_worker(world.work, rank=0) as early:
        reason = world.wait(world.supervision(stopped_timeout_seconds=20), 60)
        assert f"process {early.pid} is stopped" in (reason or "")
    with started_worker(tmp_path / "another", rank=0):
        assert world.wait(world.supervision(stopped_timeout_seconds=20), 60) is None


def test_one_process_that_failed_is_let_end_in_peace(world: World) -> None:
    """It has nobody beside it that would wait: a busy machine may take half a minute to end a Python that has loaded torch."""
    world.leave_one()
    world.mark(0, ended="user_error")
    supervision = world.supervision()
    assert world.wait(supervision, 59) is None
    reason = world.wait(supervision, 10)
    assert reason == "the process has failed, and does not end by itself within 60 s: it is ended"


def test_what_is_put_into_the_store_is_waited_for_unless_its_process_is_stopped(world: World) -> None:
    world.leave_one()
    world.mark(0, is_committing=True)
    supervision = world.supervision(stateless=True)
    assert world.wait(supervision, 60, asked=True) is None
    os.kill(world.ranks[0].pid, signal.SIGSTOP)
    os.waitpid(world.ranks[0].pid, os.WUNTRACED)
    assert "is stopped" in (world.wait(supervision, 12, asked=True) or "")


def test_a_stopped_rank_is_not_waited_for_once_the_result_is_in_the_store(world: World) -> None:
    """Rank 0 has put it there and ended; rank 1 was stopped on its last way."""
    world.mark(0, is_committing=True, ended="done")
    world.mark(1)
    os.kill(world.ranks[1].pid, signal.SIGSTOP)
    os.waitpid(world.ranks[1].pid, os.WUNTRACED)
    assert "is stopped" in (world.wait(world.supervision(), 12, asked=True) or "")


def test_a_stage_without_state_has_six_seconds_to_stop(world: World) -> None:
    world.leave_one()
    world.mark(0)
    supervision = world.supervision(stateless=True)
    assert world.wait(supervision, 6, asked=True) is None
    assert world.wait(supervision, 1, asked=True) is not None


def test_the_time_in_which_we_were_suspended_ourselves_does_not_count(world: World) -> None:
    """An hour between two looks counts as five seconds."""
    world.mark(0)
    world.mark(1)
    supervision = world.supervision(hang_timeout_seconds=100)
    assert world.wait(supervision, 10) is None
    world.now += 3600
    assert supervision.look(world.news, asked=False) is None
    assert supervision.silent == pytest.approx(14.5)


def test_only_ranks_that_reported_a_clean_save_have_saved(world: World) -> None:
    supervision = world.supervision()
    assert supervision.not_saved() == [0, 1]
    world.mark(0, ended="preempted")
    assert supervision.not_saved() == [1]
    world.mark(1, ended="crash")
    assert supervision.not_saved() == [1]
    world.mark(1, ended="preempted")
    assert supervision.not_saved() == []


def test_a_rank_on_another_machine_is_never_taken_for_gone(world: World) -> None:
    elsewhere = world.mark(0, process=Identity(1, host="elsewhere", machine="another kernel", started=-1))
    assert not elsewhere.is_gone() and not elsewhere.is_stopped()
    assert world.mark(
        1, process=replace(this_process(), started=-1)
    ).is_gone()  # the number is another process's by now


def test_ranks_are_named_briefly() -> None:
    assert names([1], 2) == "rank 1"
    assert names([1, 3], 8) == "ranks 1 and 3"
    assert names([0, 1], 2) == "any rank"
    assert names([0, 1, 2, 3, 4, 5], 8) == "ranks 0, 1, 2 and 3 more"


def test_those_that_have_ended_are_not_behind(world: World) -> None:
    world.mark(0, boundaries=9)
    world.mark(1, boundaries=3, ended="done")
    assert behind(read_marks(world.work, 2), 2) == [0]
