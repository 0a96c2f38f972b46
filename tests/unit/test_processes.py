"""Which process is which; and what dies is waited for until its locks are free, later than its environment is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.processes import carrying, end_all, exiting_since, identity_of, look_up, this_process, wait_for
from pipeline.settings.strict import CHECKOUT
from pipeline.store.work_folder import WorkFolder

# Freeing this much memory takes the kernel long enough to be seen, and comes before it closes files.
HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.store.work_folder import WorkFolder
taken = WorkFolder(Path(sys.argv[1])).locked()
taken.__enter__()
held = bytearray(1 << 30)
for start in range(0, len(held), 4096):
    held[start] = 1
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A large process that holds the lock of the work folder `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT), "MARK_OF_A_TEST": str(tmp_path)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def is_dying(process: subprocess.Popen[str]) -> bool:
    """Kills it and waits until it is on its way out; False where it went by unseen."""
    process.send_signal(signal.SIGKILL)
    while (now := look_up(process.pid)) and not now.has_ended:
        if now.is_exiting:
            return True
    return False


@pytest.mark.slow
def test_nothing_that_carried_a_mark_holds_a_lock_afterwards(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert is_dying(holder)
    assert end_all(lambda: carrying(f"MARK_OF_A_TEST={tmp_path}")) == []
    wait_for(exiting_since(0))
    assert not WorkFolder(tmp_path).lock().is_held()


@pytest.mark.slow
def test_a_step_whose_process_is_dying_is_not_said_to_run(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert (
        (said := WorkFolder(tmp_path).running()) is not None
        and said.process is not None
        and said.process.pid == holder.pid
    )
    assert is_dying(holder)
    assert WorkFolder(tmp_path).running() is None


@pytest.mark.slow
def test_a_step_whose_process_is_dying_can_be_taken_up(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    assert is_dying(holder)
    with WorkFolder(tmp_path).locked():
        pass


def test_a_process_is_told_from_a_later_one_of_its_number_and_from_another_machines() -> None:
    now = this_process()
    assert now.is_here() and not now.is_dead() and now.process() is not None
    later = replace(now, started=now.started + 1)
    assert later.is_dead() and later.process() is None
    elsewhere = replace(now, machine="another kernel", started=now.started + 1)
    assert not elsewhere.is_here() and not elsewhere.is_dead() and elsewhere.process() is None


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    identity = identity_of(ended.pid)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert identity.is_dead()
    ended.wait()
    assert identity.is_dead()
    with pytest.raises(ProcessLookupError, match=f"no process {ended.pid}"):
        identity_of(ended.pid)
