"""Commands are compared as lists; `run_command` with real processes, but none that loads torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import LAUNCHERS
from launch.base import in_front, run_command
from pipeline.errors import LaunchError
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from pipeline.store.job import Job

ARTIFACT_ID = "0000000a" + "0" * 56
BESIDE = Path(sys.executable).parent


def job(work: Path = Path("/store/work/sft-0000000a"), **resources: Any) -> Job:
    return Job(
        recipe="quickstart",
        step="sft",
        kind="sft",
        stage_version=1,
        artifact_id=ARTIFACT_ID,
        artifact_kind="causal_lm",
        params={},
        inputs={},
        input_ids={},
        source_digests={},
        seed=1,
        resources=Resources(**resources),
        store="/store",
        work=str(work),
    )


def program(name: str) -> str:
    return str(BESIDE / name) if (BESIDE / name).exists() else name


def never() -> bool:
    return False


def test_local_starts_the_worker_with_this_python() -> None:
    assert LAUNCHERS["local"].command(job()) == [
        sys.executable,
        "-m",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


def test_torchrun_on_one_node_meets_by_itself() -> None:
    assert LAUNCHERS["torchrun"].command(job(launcher="torchrun", processes=2)) == [
        program("torchrun"),
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "-m",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


def test_torchrun_on_two_nodes_meets_where_the_recipe_says() -> None:
    command = LAUNCHERS["torchrun"].command(job(launcher="torchrun", processes=8, nodes=2, rendezvous="node1:29500"))
    assert command == [
        program("torchrun"),
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:29500",
        "--rdzv-id=slipway-0000000a",
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "-m",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


def test_deepspeed_on_one_node() -> None:
    """The port is 29500 + the first eight digits of the id modulo 1000: 0xa is 10."""
    assert LAUNCHERS["deepspeed"].command(job(launcher="deepspeed", processes=2)) == [
        program("deepspeed"),
        "--num_nodes=1",
        "--num_gpus=2",
        "--master_port=29510",
        "--module",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


def test_deepspeed_on_two_nodes_reads_the_hostfile(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n")
    command = LAUNCHERS["deepspeed"].command(job(launcher="deepspeed", processes=8, nodes=2, hostfile=hostfile))
    assert command == [
        program("deepspeed"),
        f"--hostfile={hostfile}",
        "--num_nodes=2",
        "--num_gpus=8",
        "--master_port=29510",
        "--module",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


@pytest.mark.parametrize(("launcher", "field"), [("torchrun", "rendezvous"), ("deepspeed", "hostfile")])
def test_two_nodes_without_a_meeting_place_are_refused(launcher: str, field: str) -> None:
    with pytest.raises(LaunchError, match=rf"stages\.sft\.resources\.{field}: is required for 2 nodes"):
        LAUNCHERS[launcher].command(job(launcher=launcher, processes=8, nodes=2))


def test_a_command_gives_its_exit_code_and_its_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(75)"
    assert run_command([sys.executable, "-c", code], log, os.environ, never) == 75
    assert log.read_text().splitlines() == ["before", "out", "err"]


def test_a_command_runs_in_the_checkout_and_finds_its_modules_and_programs(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    code = "import os; print(os.getcwd()); print(os.environ['PYTHONPATH']); print(os.environ['PATH'])"
    environment = {"PATH": "/usr/bin", "PYTHONPATH": "/elsewhere"}
    assert run_command([sys.executable, "-c", code], log, environment, never) == 0
    assert log.read_text().splitlines() == [str(CHECKOUT), f"{CHECKOUT}:/elsewhere", f"{BESIDE}:/usr/bin"]


def test_in_front_moves_what_is_there_already() -> None:
    assert in_front("/b", "/a:/b:/c") == "/b:/a:/c"
    assert in_front("/b", None) == "/b"
    assert in_front("/b", "") == "/b"


def test_a_program_that_is_not_there_is_a_launch_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="/no/such/program: cannot be started: No such file or directory"):
        run_command(["/no/such/program"], tmp_path / "log.txt", os.environ, never)


def test_the_watch_kills_the_whole_session(tmp_path: Path) -> None:
    """The command starts a child of its own and waits; after the watch says so, neither lives."""
    marker = tmp_path / "child"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    command = [sys.executable, "-c", parent, str(marker)]
    started = time.monotonic()

    def watch() -> bool:
        return marker.exists() and marker.read_text() != ""

    assert run_command(command, tmp_path / "log.txt", os.environ, watch) == -signal.SIGKILL
    assert time.monotonic() - started < 30
    wait_until(lambda: gone(int(marker.read_text())))


def test_the_watch_is_asked_once_more_after_the_end(tmp_path: Path) -> None:
    """So that what the journal got in the last moment is shown."""
    asked = []

    def watch() -> bool:
        asked.append(time.monotonic())
        return False

    code = "import time; time.sleep(0.3)"
    assert run_command([sys.executable, "-c", code], tmp_path / "log.txt", os.environ, watch) == 0
    assert len(asked) >= 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_the_command_is_told_to_end_when_we_are_killed(tmp_path: Path) -> None:
    marker = tmp_path / "child"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    starter = (
        "import os, sys; from pathlib import Path; from launch.base import run_command;"
        f"run_command([sys.executable, '-c', {child!r}, sys.argv[1]], Path(sys.argv[2]), os.environ, lambda: False)"
    )
    command = [sys.executable, "-c", starter, str(marker), str(tmp_path / "log.txt")]
    process = subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    wait_until(lambda: marker.exists() and marker.read_text() != "")
    process.kill()
    process.wait()
    wait_until(lambda: gone(int(marker.read_text())))


def wait_until(condition: Any, timeout_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether the process ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
