"""What `slipway run` answers to signals and to ranks that die or hang: exit codes, words, and that nothing is left.

All processes are the program's own but for the stage and the launcher: see waiting_run.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.processes import carrying
from pipeline.running.marks import read_marks
from pipeline.settings.strict import CHECKOUT
from pipeline.store.store import Store

Start = Callable[..., "Run"]

pytestmark = pytest.mark.slow


class Run:
    """A run whose ranks all wait, and its processes."""

    def __init__(self, folder: Path, stage: str, processes: int, *fields: str) -> None:
        self.folder = folder
        self.mark = f"WAITING={folder}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.waiting_run", str(folder), stage, str(processes), *fields],
            cwd=CHECKOUT,
            env={**os.environ, "WAITING": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes = processes

    def wait_until_ranks_wait(self) -> None:
        wait_until(lambda: len(list(self.folder.glob("runs/work/*/waiting-*"))) == self.processes)
        (self.work,) = self.folder.glob("runs/work/*")

    def ended(self, seconds: float = 60.0) -> tuple[int, str]:
        """Exit code and output; fails if a process is left or the lock is held."""
        output, _ = self.process.communicate(timeout=seconds)
        assert carrying(self.mark) == []
        assert Store(self.folder / "runs").running(self.work) is None
        return self.process.returncode, output

    def rank(self, number: int) -> int:
        return read_marks(self.work, number + 1)[number].process.pid


def wait_until(condition: Callable[[], object], timeout_seconds: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def started(*words: object) -> Run:
        runs.append(Run(tmp_path, *words))  # type: ignore[arg-type]
        runs[-1].wait_until_ranks_wait()
        return runs[-1]

    yield started
    for run in runs:
        for process in carrying(run.mark):
            os.kill(process.pid, signal.SIGKILL)
        run.process.wait()
        assert run.process.stdout is not None
        run.process.stdout.close()


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_saves_in_every_rank_exits_with_75(start: Start, processes: int, numbers: list[int]) -> None:
    """A scheduler's warning in the same moment asks for nothing else."""
    run = start("saves", processes)
    for number in numbers:
        run.process.send_signal(number)
    code, output = run.ended()
    assert code == 75
    assert "stopped after a clean save: saved checkpoint 3" in output


def test_a_second_signal_ends_all_ranks_at_once_and_is_no_clean_save(start: Start) -> None:
    run = start("deaf", 2)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    code, output = run.ended(15)
    assert code == 128 + signal.SIGINT
    assert "killed on request, without a save" in output


def test_a_rank_that_does_not_save_is_named_and_ended_after_the_stated_time(start: Start) -> None:
    """Rank 0 saves and ends; rank 1 hears nothing."""
    run = start("half", 2, "stop_timeout_seconds: 2")
    run.process.send_signal(signal.SIGTERM)
    code, output = run.ended()
    assert code == 128 + signal.SIGTERM
    assert (
        f"no news from rank 1 (process {read_marks(run.work, 2)[1].process.pid}) for 2 s: the step is ended" in output
    )


def test_a_rank_killed_after_another_has_saved_is_no_clean_save(start: Start) -> None:
    run = start("half", 2)
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: read_marks(run.work, 2)[0].ended == "preempted")
    os.kill(run.rank(1), signal.SIGKILL)
    code, output = run.ended()
    assert code == 128 + signal.SIGTERM
    assert "rank 1" in output and "stopped after a clean save" not in output


def test_a_killed_rank_ends_the_others_within_seconds(start: Start) -> None:
    run = start("deaf", 2)
    pid = run.rank(1)
    os.kill(pid, signal.SIGKILL)
    code, output = run.ended(20)
    assert code == 1
    assert f"rank 1 was killed or broke down (process {pid}): the others are ended" in output
    assert "The same command tries again" in output


def test_a_killed_launcher_is_said(start: Start) -> None:
    """There is no log to quote: what it printed before it was killed is nothing."""
    run = start("deaf", 2)
    (launcher,) = (each for each in carrying(run.mark) if "ranks" in each.command_line()[3:4])
    os.kill(launcher.pid, signal.SIGKILL)
    code, output = run.ended(20)
    assert code == 1
    assert "the step crashed (exit code 137: SIGKILL ended its launcher)" in output


def test_a_mistake_that_one_rank_finds_is_told_with_exit_code_2(start: Start) -> None:
    """The other rank waits for ever and is ended after ten seconds; the mistake is what the user must know."""
    code, output = start("mistaken", 2).ended()
    assert code == 2
    assert "rank 1 failed: the others are ended" in output
    assert "error: rows.jsonl:3: has no field 'text'. Add it." in output


def test_a_stopped_rank_is_said_and_ended_after_the_stated_time(start: Start) -> None:
    """Silence is said after a third of it."""
    run = start("deaf", 2, "stopped_timeout_seconds: 12")
    os.kill(run.rank(1), signal.SIGSTOP)
    code, output = run.ended()
    assert code == 1
    said = [line for line in output.splitlines() if "no news from rank 1" in line]
    assert len(said) >= 2
    assert "for 12 s: the step is ended" in said[-1] and "kill -CONT" in said[-1]


def test_nothing_is_left_when_slipway_run_is_killed_with_a_rank_stopped(start: Start) -> None:
    run = start("deaf", 2)
    os.kill(run.rank(0), signal.SIGSTOP)
    run.process.kill()
    run.process.wait()
    wait_until(lambda: carrying(run.mark) == [], 5)


def test_a_stage_without_state_stops_at_the_first_signal(start: Start) -> None:
    run = start("stateless", 1)
    run.process.send_signal(signal.SIGINT)
    code, output = run.ended(20)
    assert code == 128 + signal.SIGINT, "there was nothing to save"
    assert "stopped: received SIGTERM while there was nothing to save" in output
