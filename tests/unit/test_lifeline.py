"""A rank ends with its launchers, however they end and whatever it does; with small programs in the place of torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.processes import Process, look_up
from pipeline.running.lifeline import (
    INNER_DEEPSPEED_LAUNCHER,
    Lifeline,
    StopAtOnce,
    has_lost_its_reader,
    is_abandoned,
    is_started_from_elsewhere,
)
from pipeline.running.marks import read_marks
from pipeline.settings.strict import CHECKOUT
from pipeline.store.work_folder import WorkFolder

RANK = """
import sys, time
from pathlib import Path
from pipeline.running.lifeline import Lifeline
lifeline = Lifeline(Path(sys.argv[-1]), 0)
lifeline.start(sys.argv[1:])
for _ in range(600):
    lifeline.boundary()
    time.sleep(0.1)
"""
LAUNCHER = """
import subprocess, sys, time
depth, arguments = int(sys.argv[1]), sys.argv[2:]
deeper = [sys.executable, '-c', open(arguments[-1] + '/launcher.py').read(), str(depth - 1), *arguments]
rank = [sys.executable, '-c', open(arguments[-1] + '/rank.py').read(), arguments[-1]]
subprocess.Popen(deeper if depth > 1 else rank, start_new_session=True).wait()
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")} | {
    "PYTHONPATH": str(CHECKOUT)
}


def launched(work: Path, depth: int) -> list[str]:
    """The command of a launcher that starts another, and so on, until the last starts a rank."""
    (work / "launcher.py").write_text(LAUNCHER)
    (work / "rank.py").write_text(RANK)
    return [sys.executable, "-c", LAUNCHER, str(depth), "-m", "pipeline.running.worker", str(work)]


def rank_of(work: Path) -> Process:
    wait_until(lambda: read_marks(work, 1))
    process = look_up(read_marks(work, 1)[0].process.pid)
    assert process is not None
    return process


def wait_until(condition: Callable[[], object], timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_rank_ends_with_the_outermost_launcher(tmp_path: Path, depth: int) -> None:
    """The deepspeed launcher is two deep, and its inner part knows nothing of the outer one's end."""
    launcher = subprocess.Popen(launched(tmp_path, depth), cwd=CHECKOUT, env=ENVIRONMENT)
    rank = rank_of(tmp_path)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not rank.lives(), 5)


def test_a_rank_ends_with_its_parent_while_it_holds_pythons_lock(tmp_path: Path) -> None:
    """A thread of ours would not run: Linux itself must end the rank. `PyDLL` keeps the lock during `sleep`."""
    command = launched(tmp_path, 1)
    busy = RANK + "\nimport ctypes\nctypes.PyDLL(None).sleep(60)\n"
    (tmp_path / "rank.py").write_text(busy.replace("range(600)", "range(2)"))
    launcher = subprocess.Popen(command, cwd=CHECKOUT, env=ENVIRONMENT)
    rank = rank_of(tmp_path)
    time.sleep(0.5)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not rank.lives(), 5)


def test_a_stopped_rank_ends_with_its_parent(tmp_path: Path) -> None:
    launcher = subprocess.Popen(launched(tmp_path, 1), cwd=CHECKOUT, env=ENVIRONMENT)
    rank = rank_of(tmp_path)
    os.kill(rank.pid, signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not rank.lives(), 5)


@pytest.mark.slow
def test_a_shell_or_a_script_that_started_the_launcher_may_end(tmp_path: Path) -> None:
    """`nohup torchrun ... &` in a script; the script here is Python as well, and knows the work folder."""
    script = "import subprocess, sys; subprocess.Popen(sys.argv[2:], start_new_session=True)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *launched(tmp_path, 1)], env=ENVIRONMENT, check=True)
    rank = rank_of(tmp_path)
    launcher = look_up(rank.parent)
    assert launcher is not None
    time.sleep(1.5)
    assert rank.lives() and launcher.parent != os.getpid()
    os.kill(launcher.pid, signal.SIGKILL)
    wait_until(lambda: not rank.lives(), 5)


def test_a_rank_that_a_launcher_started_is_abandoned_without_it() -> None:
    """Process 1, to which orphans go, is no Python program; a Python program of the user's own may start ranks, too."""
    this = look_up(os.getpid())
    assert is_abandoned([], look_up(1), {"TORCHELASTIC_RUN_ID": "x"}, ["work"])
    assert is_abandoned([], look_up(1), {}, ["--local_rank=1", "work"])
    assert not is_abandoned([], look_up(1), {"RANK": "1"}, ["work"])
    assert not is_abandoned([], this, {"TORCHELASTIC_RUN_ID": "x"}, ["work"])


@pytest.mark.parametrize(("more", "abandoned"), [([], True), (["--node_rank=1"], False)])
def test_the_inner_deepspeed_launcher_needs_the_outer_one_on_its_own_machine(more: list[str], abandoned: bool) -> None:
    code = "import time; time.sleep(60)"
    inner = subprocess.Popen([sys.executable, "-c", code, INNER_DEEPSPEED_LAUNCHER, *more])
    try:
        wait_until(lambda: INNER_DEEPSPEED_LAUNCHER in look_up(inner.pid).command_line())  # type: ignore[union-attr]
        process = look_up(inner.pid)
        assert process is not None
        assert is_abandoned([process], process, {}, ["--local_rank=0", "work"]) is abandoned
        assert is_started_from_elsewhere([process]) is not abandoned
    finally:
        inner.kill()
        inner.wait()


def test_a_reader_that_is_gone_is_noticed(tmp_path: Path) -> None:
    """What is written to a file is always read by somebody."""
    reader, writer = os.pipe()
    assert not has_lost_its_reader(writer)
    os.close(reader)
    assert has_lost_its_reader(writer)
    os.close(writer)
    with (tmp_path / "log").open("wb") as log:
        assert not has_lost_its_reader(log.fileno())


def test_the_mark_counts_boundaries_and_keeps_the_first_word_of_the_end(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    lifeline = Lifeline(tmp_path, 1)
    lifeline.boundary()
    lifeline.boundary()
    lifeline.show()
    mark = read_marks(tmp_path, 2)[1]
    assert (mark.boundaries, mark.ended, mark.process.pid) == (2, None, os.getpid())
    lifeline.sign()
    lifeline.show()
    mark = read_marks(tmp_path, 2)[1]
    assert (mark.boundaries, mark.signs) == (2, 1)  # news, though the others come to no such boundary
    lifeline.boundary()
    lifeline.end("preempted")
    lifeline.end("done")
    mark = read_marks(tmp_path, 2)[1]
    assert (mark.boundaries, mark.ended) == (3, "preempted")


@pytest.mark.slow
def test_a_stage_without_state_that_does_not_look_up_is_ended_as_stopped(tmp_path: Path) -> None:
    """The main thread takes SIGTERM and goes on; three seconds later the process exits with 143 and has said so."""
    code = """
import signal, sys, time
from pathlib import Path
from pipeline.running.lifeline import Lifeline, StopAtOnce
from pipeline.store.work_folder import WorkFolder
signal.signal(signal.SIGTERM, lambda *_: print('interrupted', flush=True))
work = Path(sys.argv[-1])
lifeline = Lifeline(work, 0)
lifeline.every_poll = StopAtOnce(WorkFolder(work), lambda number: print('stopped', number, flush=True))
lifeline.start([str(work)])
while True:
    time.sleep(0.1)
"""
    WorkFolder(tmp_path).request_stop()
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert ended.stdout.split() == ["interrupted", "stopped", "15"]


def test_a_stage_without_state_is_left_alone_until_it_is_asked(tmp_path: Path) -> None:
    stop = StopAtOnce(WorkFolder(tmp_path), lambda number: pytest.fail("nobody asked"))
    stop()
    assert stop.since is None
