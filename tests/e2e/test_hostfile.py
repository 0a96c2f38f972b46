"""A step on the nodes of a hostfile, through the deepspeed launcher, pdsh and a real ssh: ended with its run, gone on with, the same."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.ssh import Ssh, missing
from tests.e2e.driving import (
    ROOT,
    TINY,
    at_step,
    checkpoints,
    command,
    processes_about,
    store_without,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
NODES = ("node1", "node2")
ENDED_SECONDS = 10.0


def test_ranks_on_other_nodes_end_with_a_run_that_is_killed_and_it_goes_on(
    reference_store: Path, tmp_path: Path
) -> None:
    """Nothing on the nodes is a child of the run, nor carries its mark: only the connection tells that it is gone."""
    store = store_without(reference_store, "base", tmp_path / "store")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NODES))
    settings = {"nodes": 2, "processes": 1, "launcher": f"{{kind: deepspeed, hostfile: {hostfile}}}"}
    changes = [f"--set=stages.base.resources.{name}={value}" for name, value in settings.items()]
    running = command("run", TINY, "--only", "base", "--store", store, *changes)
    with Ssh(tmp_path / "ssh", NODES) as ssh:
        process = subprocess.Popen(running, cwd=ROOT, env=ssh.environment, stdout=subprocess.PIPE, text=True)
        wait_for(at_step(store, "base", 8), process, store)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + ENDED_SECONDS
        while left := processes_about(str(store)):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)
        assert checkpoints(store, "base").newest().step == 6
        again = subprocess.run(running, cwd=ROOT, env=ssh.environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "checkpoint 6 of 24, verified" in again.stdout
    assert weights(store, "base") == weights(reference_store, "base")
