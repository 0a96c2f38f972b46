"""Programs that hang, fork, eat memory, print, die or lie: contained within seconds, told apart, and none of them left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.processes import carrying, descendants, look_up
from pipeline.settings.strict import CHECKOUT
from stages.lib.processes.contained import (
    KEPT_BYTES,
    OF_THE_JOB,
    Abandoned,
    Ended,
    ProgramLimits,
    run_contained,
    surroundings,
)

pytestmark = pytest.mark.slow

LIMITS = ProgramLimits(seconds=2.5, first_seconds=20.0, memory_bytes=256 << 20)
SECONDS = 12.0
"""Within which each of them must be over on a busy machine: python starts twice, and the limits are 2.5 s."""
PREAMBLE = """
import json, os, signal, subprocess, sys, time
def answer(**fields):
    os.write(int(sys.argv[2]), json.dumps(fields).encode() + b"\\n")
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable that everything started in the test carries, unless it takes care not to."""
    monkeypatch.setenv("CONTAINED_TEST", str(os.getpid()))
    return f"CONTAINED_TEST={os.getpid()}"


@pytest.fixture(autouse=True)
def nothing_is_left(mark: str) -> Iterator[None]:
    before = {process.pid for process in descendants(os.getpid())}
    yield
    assert [process.command_line() for process in carrying(mark)] == []
    assert [process for process in descendants(os.getpid()) if process.pid not in before] == []


def ended(code: str, folder: Path, *, num_answers: int = 1, limits: ProgramLimits = LIMITS) -> Ended:
    program = folder / "program.py"
    program.write_text(PREAMBLE + textwrap.dedent(code))
    started = time.monotonic()
    found = run_contained(program, {}, num_answers, limits, surroundings(os.environ))
    assert time.monotonic() - started < SECONDS
    return found


def test_a_sound_program_answers(tmp_path: Path) -> None:
    found = ended("answer(a=1); answer(b=[0.1]); print('done')", tmp_path, num_answers=2)
    assert (found.answers, found.trouble, found.how) == ([{"a": 1}, {"b": [0.1]}], None, "")
    assert found.printed_bytes in (0, 5)  # it is over with the last answer


@pytest.mark.parametrize(
    ("code", "trouble", "how"),
    [
        ("time.sleep(1000)", "timeout", "it took more than 2.5 s"),
        ("while True: pass", "timeout", "it took more than 2.5 s"),
        (
            "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(1000)",
            "timeout",
            "it took more than 2.5 s",
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "it took more than 2.5 s"),
        ("os._exit(3)", "died", "its process ended with code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died", "its process died of signal 11"),
        ("os.write(int(sys.argv[2]), b'no json\\n')", "died", "it wrote where only its answers belong"),
        ("while True: os.write(int(sys.argv[2]), b'x' * 65536)", "died", "it wrote where only its answers belong"),
        # Each of two processes is within its own limit; together they are beyond it.
        (
            "os.fork(); import mmap; m = mmap.mmap(-1, 200 << 20)\nfor _ in range(200): m.write(bytes(1 << 20))\ntime.sleep(9)",
            "memory",
            "it took more than 0.25 GiB of memory",
        ),
        ("for _ in range(7): os.fork()\ntime.sleep(1000)", "processes", "it started more than 64 processes"),
    ],
)
def test_what_goes_wrong_after_an_answer(code: str, trouble: str, how: str, tmp_path: Path) -> None:
    found = ended(f"answer(a=1)\n{code}", tmp_path, num_answers=2)
    assert (found.answers, found.trouble, found.how) == ([{"a": 1}], trouble, how)


def test_more_memory_is_refused_to_the_program(tmp_path: Path) -> None:
    code = """
    try:
        bytearray(1 << 30)
    except MemoryError:
        answer(refused=True)
    """
    assert ended(code, tmp_path).answers == [{"refused": True}]


def test_a_fork_bomb_of_two_levels_leaves_nothing(tmp_path: Path) -> None:
    """Each child leaves the group and the session, forgets its environment, and starts others, whose parents end at once."""
    code = """
    def escape(level):
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if level:
                    escape(level - 1)
                os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "escaped"], {})
    escape(2)
    answer(pid=os.getpid())
    time.sleep(1000)
    """
    found = ended(code, tmp_path, num_answers=2)
    assert found.trouble == "timeout"
    assert escaped() == []
    assert look_up(found.answers[0]["pid"]) is None


def escaped() -> list[str]:
    lines = [look_up(int(name)) for name in os.listdir("/proc") if name.isdigit()]
    return [" ".join(each.command_line()) for each in lines if each and "escaped" in each.command_line()]


def test_what_is_started_in_the_background_ends_with_the_last_answer(tmp_path: Path) -> None:
    code = """
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "escaped"], start_new_session=True)
    answer(a=1)
    """
    assert ended(code, tmp_path).trouble is None
    assert escaped() == []


def test_prints_are_kept_in_part_and_counted(tmp_path: Path) -> None:
    """Two million bytes, through two descriptors and a child: no more than `KEPT_BYTES` of them are held."""
    code = """
    print("x" * 999_999)
    sys.stderr.write("y" * 999_999 + "\\n")
    subprocess.run(["echo", "of a child"])
    answer(a=1)
    """
    found = ended(code, tmp_path)
    assert found.answers == [{"a": 1}]
    assert found.printed == b"x" * KEPT_BYTES
    assert found.printed_bytes == 2_000_000 + len("of a child\n")


def test_endless_printing_is_a_hang(tmp_path: Path) -> None:
    found = ended("answer(a=1)\nwhile True: print('x' * 10000)", tmp_path, num_answers=2)
    assert (found.trouble, len(found.printed)) == ("timeout", KEPT_BYTES)


def test_the_first_answer_has_a_time_of_its_own(tmp_path: Path) -> None:
    limits = ProgramLimits(seconds=0.5, first_seconds=8.0, memory_bytes=256 << 20)
    found = ended("time.sleep(1.5); answer(a=1); answer(b=1); time.sleep(3)", tmp_path, num_answers=3, limits=limits)
    assert (len(found.answers), found.trouble, found.how) == (2, "timeout", "it took more than 0.5 s")


def test_a_program_is_no_rank_and_stands_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OF_THE_JOB, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    code = """
    os.unlink(sys.argv[1])
    answer(names=sorted(os.environ), hash=os.environ["PYTHONHASHSEED"], files=os.listdir("."), folder=os.getcwd())
    """
    (found,) = ended(code, tmp_path).answers
    assert not {*OF_THE_JOB, "TORCHELASTIC_RUN_ID"} & set(found["names"])
    assert (found["hash"], found["files"]) == ("0", [])
    assert not Path(found["folder"]).exists()


def test_an_interrupted_caller_leaves_nothing(tmp_path: Path) -> None:
    """As a signal that stops the step does: what is raised while we wait goes on, and the program has ended."""

    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            ended("time.sleep(1000)", tmp_path)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)


def test_a_program_is_abandoned_where_its_caller_is_to_stop(tmp_path: Path) -> None:
    """Though it answers nothing, within seconds of the wish; and none is started after it."""
    program = tmp_path / "program.py"
    program.write_text(PREAMBLE + "answer(a=1); time.sleep(1000)")
    wishes = iter([False] * 3)
    limits = ProgramLimits(seconds=15.0, first_seconds=15.0, memory_bytes=256 << 20)
    started = time.monotonic()
    with pytest.raises(Abandoned):
        run_contained(program, {}, 2, limits, surroundings(os.environ), lambda: next(wishes, True))
    assert time.monotonic() - started < SECONDS
    program.write_text("open('was_here', 'w')")
    with pytest.raises(Abandoned):
        run_contained(program, {}, 1, limits, surroundings(os.environ), lambda: True)


def test_a_killed_caller_leaves_nothing(tmp_path: Path, mark: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PREAMBLE + "os.setsid() if os.fork() == 0 else None\ntime.sleep(1000)")
    (folders := tmp_path / "folders").mkdir()
    code = (
        "import os, pathlib, sys; from stages.lib.processes.contained import *;"
        f"run_contained(pathlib.Path({str(program)!r}), {{}}, 1, ProgramLimits(99, 99, 1 << 30), dict(os.environ))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TMPDIR": str(folders)},
    )
    deadline = time.monotonic() + 60
    while sum(str(program) in " ".join(each.command_line()[-3:-2]) for each in carrying(mark)) < 2:
        assert time.monotonic() < deadline and caller.poll() is None
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    while carrying(mark):
        assert time.monotonic() < deadline
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.05)
    assert list(folders.iterdir()) == []
