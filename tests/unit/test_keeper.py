"""Nothing of a command outlives it, or whoever ran it: with real processes in sessions of their own, none that loads torch.

The command here is two deep, like torchrun and its ranks: `outer` starts `inner` in another session, both write their
numbers into files and wait for a minute.
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

from launch.base import run_command
from pipeline.processes import descendants, look_up
from pipeline.settings.strict import CHECKOUT

INNER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
open(sys.argv[1] + '/inner.new', 'w').write(str(os.getpid()))
os.rename(sys.argv[1] + '/inner.new', sys.argv[1] + '/inner')
time.sleep(60)
"""
OUTER = f"""
import os, subprocess, sys, time
open(sys.argv[1] + '/outer', 'w').write(str(os.getpid()))
subprocess.Popen([sys.executable, '-c', {INNER!r}, sys.argv[1]], start_new_session=True)
time.sleep(60 if len(sys.argv) < 3 else 0)
while not os.path.exists(sys.argv[1] + '/inner'):
    time.sleep(0.01)
sys.exit(7)
"""
RUNNER = """
import os, sys
from pathlib import Path
from launch.base import run_command
run_command(sys.argv[2:], Path(sys.argv[1]), os.environ, lambda: False)
"""


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", OUTER, str(folder), *more]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for `slipway run`, whose command and that one's child are there."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(tmp_path / "log.txt"), *command(tmp_path)],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    wait_until(lambda: (tmp_path / "inner").exists())
    yield process
    process.kill()
    process.wait()


def number(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


def gone(folder: Path) -> bool:
    """Whether both processes of the command have ended."""
    found = [look_up(number(folder, name)) for name in ("inner", "outer")]
    return all(process is None or process.has_ended for process in found)


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_nothing_is_left_when_whoever_ran_the_command_is_killed(
    tmp_path: Path, runner: subprocess.Popen[bytes]
) -> None:
    runner.kill()
    runner.wait()
    wait_until(lambda: gone(tmp_path), 5)


def test_nothing_is_left_when_it_is_killed_while_the_child_is_stopped(
    tmp_path: Path, runner: subprocess.Popen[bytes]
) -> None:
    os.kill(number(tmp_path, "inner"), signal.SIGSTOP)
    os.kill(number(tmp_path, "outer"), signal.SIGSTOP)
    runner.kill()
    runner.wait()
    wait_until(lambda: gone(tmp_path), 5)


def test_nothing_is_left_when_the_keeper_is_killed(tmp_path: Path, runner: subprocess.Popen[bytes]) -> None:
    """The command dies with it by itself; its child, whose parent is process 1 then, is known by its environment."""
    outer = look_up(number(tmp_path, "outer"))
    assert outer is not None and outer.parent != runner.pid
    os.kill(outer.parent, signal.SIGKILL)
    assert runner.wait(10) == 0
    assert gone(tmp_path)


def test_nothing_is_left_when_the_command_is_killed(tmp_path: Path, runner: subprocess.Popen[bytes]) -> None:
    os.kill(number(tmp_path, "outer"), signal.SIGKILL)
    assert runner.wait(10) == 0
    assert gone(tmp_path)


@pytest.mark.slow
def test_the_keeper_leaves_an_orderly_end_to_the_command(tmp_path: Path, runner: subprocess.Popen[bytes]) -> None:
    """A scheduler sends SIGTERM to every process; the rank, which takes it as a request to save, must go on to live."""
    outer = look_up(number(tmp_path, "outer"))
    assert outer is not None
    os.kill(outer.parent, signal.SIGTERM)
    os.kill(number(tmp_path, "inner"), signal.SIGTERM)
    time.sleep(0.5)
    assert not gone(tmp_path) and runner.poll() is None


def test_nothing_is_left_when_the_watch_says_so_or_fails(tmp_path: Path) -> None:
    before = {process.pid for process in descendants(os.getpid())}

    def started() -> bool:
        return (tmp_path / "inner").exists()

    def fails() -> bool:
        if started():
            raise BrokenPipeError
        return False

    assert run_command(command(tmp_path), tmp_path / "log.txt", os.environ, started) == -signal.SIGKILL
    assert gone(tmp_path)
    (tmp_path / "inner").unlink()
    with pytest.raises(BrokenPipeError):
        run_command(command(tmp_path), tmp_path / "log.txt", os.environ, fails)
    assert gone(tmp_path)
    assert {process.pid for process in descendants(os.getpid())} <= before


def test_nothing_is_left_when_the_command_ends_by_itself_with_its_code(tmp_path: Path) -> None:
    code = run_command(command(tmp_path, "ends"), tmp_path / "log.txt", os.environ, lambda: False)
    assert code == 7
    assert gone(tmp_path)


def test_a_signal_that_ends_the_command_shows_in_its_code(tmp_path: Path) -> None:
    """As in a shell: 128 + 15."""
    kill = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
    assert run_command(kill, tmp_path / "log.txt", os.environ, lambda: False) == 143
