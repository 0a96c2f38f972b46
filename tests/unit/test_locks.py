"""Who runs a step: one process at a time, known to whoever asks, and asking hinders nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.processes import this_machine
from pipeline.store.locks import Lock
from pipeline.store.work_folder import InUseError, WorkFolder

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kernel", "files")


IMPORTS = """
import os, sys, time
from pathlib import Path
from pipeline.store.work_folder import InUseError, WorkFolder
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process with this code and these arguments; none outlives the test."""
    started = []

    def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", IMPORTS + textwrap.dedent(code), *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream and not stream.closed:
                stream.close()
        process.wait()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDER = """
with WorkFolder(Path(sys.argv[1])).locked(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_start_fails_because_somebody_asks(tmp_path: Path, kind: str, start: Start) -> None:
    """300 times and more: until the other process has asked ten times while the lock was taken, and ten while it was not."""
    folder, enough = WorkFolder(tmp_path), tmp_path / "enough"
    poller = start(
        """
        answers = {True: 0, False: 0}
        print("asking", flush=True)
        while min(answers.values()) < 10:
            answers[WorkFolder(Path(sys.argv[1])).running() is not None] += 1
        Path(sys.argv[2]).touch()
        while True:
            WorkFolder(Path(sys.argv[1])).running()
        """,
        tmp_path,
        enough,
    )
    assert line_of(poller) == "asking"
    starts = 0
    while starts < 300 or not enough.exists():
        with folder.locked(kind):
            starts += 1
        assert poller.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("kernel", "kernel"), ("files", "files"), ("kernel", "files")])
def test_of_two_that_start_at_once_never_both_win(tmp_path: Path, kinds: tuple[str, str], start: Start) -> None:
    """Each holds the lock for a moment, many times: what only its holder may create was never there already."""
    racers = [
        start(
            """
            won, until = 0, time.monotonic() + 1
            print("ready", flush=True)
            sys.stdin.readline()
            while time.monotonic() < until:
                try:
                    with WorkFolder(Path(sys.argv[1])).locked(sys.argv[2]):
                        os.close(os.open(sys.argv[3], os.O_CREAT | os.O_EXCL))
                        os.unlink(sys.argv[3])
                        won += 1
                except InUseError:
                    pass
            print(won)
            """,
            tmp_path,
            kind,
            tmp_path / "mine",
        )
        for kind in kinds
    ]
    assert [line_of(racer) for racer in racers] == ["ready", "ready"]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    # A busy machine may leave one of them without a turn.
    assert sum(int(racer.communicate(timeout=60)[0]) for racer in racers) > 5
    assert [racer.returncode for racer in racers] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_of_many_that_start_after_a_killed_one_exactly_one_wins(tmp_path: Path, kind: str, start: Start) -> None:
    for attempt in range(2):
        dead = start(HOLDER, tmp_path, kind)
        assert line_of(dead) == "held"
        assert WorkFolder(tmp_path).running() is not None
        dead.kill()
        dead.communicate()
        assert WorkFolder(tmp_path).running() is None
        starters = [
            start(
                """
                while not Path(sys.argv[3]).exists():
                    pass
                try:
                    with WorkFolder(Path(sys.argv[1])).locked(sys.argv[2]):
                        time.sleep(1)
                    print("won")
                except InUseError as error:
                    print(error)
                """,
                tmp_path,
                kind,
                tmp_path / f"go-{attempt}",
            )
            for _ in range(4)
        ]
        (tmp_path / f"go-{attempt}").touch()
        said = [starter.communicate(timeout=60)[0].strip() for starter in starters]
        assert said.count("won") == 1, said
        assert all("is being run" in each for each in said if each != "won"), said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_whoever_holds_it_is_named_and_keeps_it(tmp_path: Path, kind: str, other: str, start: Start) -> None:
    folder = WorkFolder(tmp_path)
    holder = start(HOLDER, tmp_path, kind)
    assert line_of(holder) == "held"
    running = folder.running()
    assert running is not None and running.process is not None
    assert (running.process.pid, running.log) == (holder.pid, str(tmp_path / "log.txt"))
    with (
        pytest.raises(InUseError, match=f"is being run by process {holder.pid} on .*Wait for it"),
        folder.locked(other),
    ):
        pass
    holder.communicate("enough")
    assert folder.running() is None
    with folder.locked(other):
        assert folder.running() is not None


def test_an_owner_whom_nobody_here_can_look_for_holds_it_until_its_file_is_removed(tmp_path: Path) -> None:
    owner = {"pid": 1, "host": "elsewhere", "machine": "another kernel", "started": 5}
    (tmp_path / "lock-4").write_text(json.dumps({"owner": owner}))
    folder = WorkFolder(tmp_path)
    for kind in KINDS:
        with (
            pytest.raises(InUseError, match=rf"If it died with its machine, remove {tmp_path}/lock-4\."),
            folder.locked(kind),
        ):
            pass
    (tmp_path / "lock-4").unlink()
    with folder.locked("files"):
        assert [path.name for path in tmp_path.glob("lock-*")] == ["lock-1"]


def test_a_number_that_another_process_got_since_is_not_its_owner(tmp_path: Path) -> None:
    """This process lives, but the owner that bears its number started at another time."""
    owner = {"pid": os.getpid(), "host": "here", "machine": this_machine(), "started": 1}
    (tmp_path / "lock-4").write_text(json.dumps({"owner": owner}))
    assert WorkFolder(tmp_path).running() is None


def test_a_lock_that_is_being_written_is_held_and_one_that_never_was_finished_is_not(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    (tmp_path / "lock-1").touch()
    assert lock.is_held()
    os.utime(tmp_path / "lock-1", (0, 0))
    assert not lock.is_held()


def test_an_unknown_kind_of_lock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_LOCKS", "flies")
    with (
        pytest.raises(StoreError, match=r"SLIPWAY_LOCKS: is 'flies'\. It may be kernel or files"),
        WorkFolder(tmp_path).locked(),
    ):
        pass
    monkeypatch.setenv("SLIPWAY_LOCKS", "files")
    with WorkFolder(tmp_path).locked():
        assert (tmp_path / "lock-1").exists()
