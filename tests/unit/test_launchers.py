"""Commands are compared as lists; `run_command` with real processes, but none that loads torch."""

from __future__ import annotations

import os
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
from pipeline.store.job import Job, read_job

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
    command = LAUNCHERS["torchrun"].command(
        job(launcher={"kind": "torchrun", "rendezvous": "node1:29500"}, processes=8, nodes=2)
    )
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


def test_deepspeed_takes_the_gpus_that_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher itself passes over CUDA_VISIBLE_DEVICES where --num_gpus is given."""

    def where(**resources: Any) -> str:
        return LAUNCHERS["deepspeed"].command(job(launcher="deepspeed", **resources))[1]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,7")
    assert where(processes=2, device="cuda") == "--include=localhost:4,5"
    assert where(processes=2, device="cpu") == "--num_nodes=1"
    with pytest.raises(LaunchError, match=r"allows 4, 5, 7, and the step has 4 processes\. Lower resources.processes"):
        where(processes=4, device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a,GPU-77b0")
    with pytest.raises(LaunchError, match=r"knows GPUs by their numbers, .* Use the launcher torchrun"):
        where(processes=2, device="cuda")
    assert "--nproc-per-node=2" in LAUNCHERS["torchrun"].command(job(launcher="torchrun", processes=2, device="cuda"))
    for nothing in ("", " ", "-1", "NoDevFiles", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        with pytest.raises(LaunchError, match=r"hides all GPUs, .* or write `device: cpu`"):
            where(processes=1, device="cuda")
        assert where(processes=1, device="cpu") == "--num_nodes=1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,4")
    with pytest.raises(LaunchError, match="names 4 twice"):
        where(processes=2, device="cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert where(processes=2, device="cuda") == "--num_nodes=1"


def test_deepspeed_on_two_nodes_reads_the_hostfile(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8\nnode2 slots=8\n")
    command = LAUNCHERS["deepspeed"].command(
        job(launcher={"kind": "deepspeed", "hostfile": str(hostfile)}, processes=8, nodes=2)
    )
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


def test_a_hostfile_of_one_node_does_not_hide_which_gpus_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hostfile the launcher passes over CUDA_VISIBLE_DEVICES, whatever else it is told."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=8\n")
    launcher = {"kind": "deepspeed", "hostfile": str(hostfile)}

    def command(**resources: Any) -> list[str]:
        return LAUNCHERS["deepspeed"].command(job(**{"launcher": launcher, "processes": 2, **resources}))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(LaunchError, match=r"launcher\.hostfile: would have .*, which is 4,5\. Leave it out"):
        command(device="cuda")
    assert command(device="cuda", launcher="deepspeed")[1] == "--include=localhost:4,5"
    assert command(device="cpu")[1] == command(device="cuda", nodes=2)[1] == f"--hostfile={hostfile}"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert command(device="cuda")[1] == f"--hostfile={hostfile}"


@pytest.mark.parametrize(("launcher", "field"), [("torchrun", "rendezvous"), ("deepspeed", "hostfile")])
def test_two_nodes_without_a_meeting_place_are_refused(launcher: str, field: str) -> None:
    with pytest.raises(LaunchError, match=rf"stages\.sft\.resources\.launcher\.{field}: is required for 2 nodes"):
        LAUNCHERS[launcher].command(job(launcher=launcher, processes=8, nodes=2))


def test_options_of_another_launcher_are_not_looked_at() -> None:
    """`slipway job` prints the command of every launcher; the recipe has told one of them something."""
    named = job(launcher={"kind": "torchrun", "rendezvous": "node1:29500"}, processes=2)
    assert LAUNCHERS["deepspeed"].command(named)[1] == "--num_nodes=1"


def test_a_hostfile_that_is_gone_since_the_plan_is_a_launch_error(tmp_path: Path) -> None:
    named = job(launcher={"kind": "deepspeed", "hostfile": str(tmp_path / "hosts")}, processes=2, nodes=2)
    with pytest.raises(LaunchError, match=r"resources\.launcher\.hostfile: no such file"):
        LAUNCHERS["deepspeed"].command(named)


def test_a_job_keeps_its_launcher_through_its_file(tmp_path: Path) -> None:
    named = job(tmp_path, launcher={"kind": "torchrun", "rendezvous": "node1:29500"}, nodes=2)
    named.write()
    assert read_job(tmp_path) == named


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
    with pytest.raises(LaunchError, match="/no/such/program: cannot be started: there is no such program"):
        run_command(["/no/such/program"], tmp_path / "log.txt", os.environ, never)


def test_the_watch_is_asked_once_more_after_the_end(tmp_path: Path) -> None:
    """So that what the journal got in the last moment is shown."""
    asked = []

    def watch() -> bool:
        asked.append(time.monotonic())
        return False

    code = "import time; time.sleep(0.3)"
    assert run_command([sys.executable, "-c", code], tmp_path / "log.txt", os.environ, watch) == 0
    assert len(asked) >= 2
