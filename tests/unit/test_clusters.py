"""Profiles, batch scripts and chains of jobs, without a scheduler: `tests/e2e/test_slurm.py` has a real one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import LAUNCHERS
from launch.clusters.profile import Profile, known_profiles, load_profile, minutes
from launch.clusters.script import quoted
from launch.clusters.slurm import Queued, Slurm
from launch.clusters.trial import requests, trial_script
from pipeline.command.states import with_queue
from pipeline.errors import LaunchError, Problem, RecipeError, StoreError
from pipeline.running.interrupts import Interrupts
from pipeline.running.prepared import SCHEDULER_ASKS
from pipeline.store.job import Job, read_job
from pipeline.submitting.submit import alone, cancel, submit
from stages import STAGES
from tests.unit.test_launchers import job, program
from tests.unit.test_plan import planned, run


def profile(folder: Path, text: str) -> Profile:
    path = folder / "profile.yaml"
    path.write_text(text)
    return load_profile(str(path), STAGES)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


# Profiles


def test_the_profiles_that_come_along_are_read() -> None:
    assert known_profiles() == ["example"]
    assert load_profile("example", STAGES).gpus == "gpus-per-node"


def test_everything_that_is_wrong_with_a_profile_is_said_at_once(tmp_path: Path) -> None:
    text = r"""
partition: "a b"
account: "$(touch pwned)"
qos: "x\ny"
time: 24h
gpus: gpu:8
memori: 64G
sbatch: ["rm -rf"]
setup: ["one\ntwo"]
environment: {HF_TOKEN: abc}
interface: "ib0;id"
cpu: {time: "1:2:3:4"}
"""
    with pytest.raises(RecipeError) as caught:
        profile(tmp_path, text)
    said = str(caught.value)
    for name in (
        "partition",
        "account",
        "qos",
        "time",
        "gpus",
        "sbatch",
        "setup",
        "environment",
        "interface",
        "cpu.time",
    ):
        assert re.search(rf"profile\.yaml: {re.escape(name)}", said), (name, said)
    assert "Did you mean 'memory'?" in said
    assert "HF_TOKEN looks like a secret" in said
    assert "abc" not in said


def test_a_profile_for_a_stage_that_does_not_exist_or_a_profile_that_does_not(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.pretrian: there is no stage of this kind. Did you mean 'pretrain'"):
        profile(tmp_path, "stages: {pretrian: {time: '10'}}")
    with pytest.raises(RecipeError, match=r"there is no such profile.*Did you mean 'example'"):
        load_profile("exmple", STAGES)
    with pytest.raises(RecipeError, match="is no profile"):
        profile(tmp_path, "- a\n")


def test_a_stage_s_own_words_come_first_then_those_of_cpu_jobs(tmp_path: Path) -> None:
    read = profile(
        tmp_path,
        """
partition: gpu
time: "10"
sbatch: ["--exclusive"]
cpu: {partition: cpu, time: "20", sbatch: ["--nice"]}
stages: {sft: {time: "30"}}
""",
    )
    on_gpu, on_cpu = (read.request("sft", on_gpu=each) for each in (True, False))
    assert (on_gpu.partition, on_gpu.time, on_gpu.sbatch) == ("gpu", "30", ["--exclusive"])
    assert (on_cpu.partition, on_cpu.time, on_cpu.sbatch) == ("cpu", "30", ["--exclusive", "--nice"])


# Scripts


def test_a_script_asks_for_what_the_job_and_the_profile_say(tmp_path: Path) -> None:
    read = profile(
        tmp_path,
        """
partition: gpu
account: a1
time: "1-00:00:00"
gpus: gres:a100
memory: "0"
cpus_per_node: 64
interface: ib0
setup: ["module load cuda/12.4"]
sbatch: ["--exclusive"]
warn_before_end_seconds: 300
""",
    )
    script = Slurm(read).script(job(launcher="torchrun", processes=8, nodes=2), distributed=True)
    assert options(script) == [
        "--job-name=sft",
        '--chdir="/store/work/sft-0000000a"',
        "--output=console-%j.log",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gres=gpu:a100:8",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=a1",
        "--mem=0",
        "--signal=B:USR1@300",
        "--requeue",
        "--exclusive",
    ]
    assert "module load cuda/12.4\nexport NCCL_SOCKET_IFNAME=ib0\nexport GLOO_SOCKET_IFNAME=ib0\n" in script
    on_cpu = Slurm(read).script(job(device="cpu"), distributed=True)
    of_data = Slurm(read).script(job(), distributed=False)
    assert not any("gpu:" in option for option in options(on_cpu) + options(of_data))


def test_gpus_that_the_profile_does_not_ask_for_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"is cuda, and the profile asks for no GPUs. Write `gpus: gpus-per-node`"):
        Slurm().script(job(device="cuda"), distributed=True)
    asked = Slurm(Profile(gpus="gpus-per-node")).script(job(device="cuda", processes=4), distributed=True)
    assert "--gpus-per-node=4" in options(asked)


def test_whatever_stands_in_a_path_or_a_variable_is_taken_literally(tmp_path: Path) -> None:
    """The lines that a shell reads are run by one: nothing in them is executed, and the variable arrives as it was given."""
    odd = tmp_path / """it's "a" $(touch pwned) `touch pwned` \\ %j"""
    odd.mkdir()
    value = """'$(touch pwned)' "`touch pwned`" $HOME \\"""
    script = Slurm(Profile(environment={"ODD": value})).script(job(work=odd), distributed=False)
    assert f"--chdir={quoted(str(odd))}" in options(script)
    before = script.partition("# SLURM says so")[0]
    shown = subprocess.run(
        ["bash", "-c", before + 'printf %s "$ODD"'], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (shown.stdout, shown.stderr) == (value, "")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [odd.name]
    with pytest.raises(RecipeError, match="cannot stand in a batch script"):
        Slurm().script(job(work=tmp_path / "two\nlines"), distributed=False)


def run_script(script: str, step: str, state: str = "RUNNING") -> subprocess.Popen[str]:
    """Runs the shell's part of a script around another step; `scontrol` says what it is asked, and `squeue` the job's state."""
    line = next(line for line in script.splitlines() if line.endswith(" &"))
    functions = f'scontrol() {{ echo "$1" "$2"; }}; squeue() {{ echo {state}; }}\n'
    script = functions + script.replace(line, f"{step} &")
    environment = {"SLURM_JOB_ID": "17", "PATH": os.environ["PATH"]}
    return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("code", "crashes", "state", "requeued"),
    [
        (75, 0, "RUNNING", True),
        (75, 0, "CANCELLED", False),
        (0, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (1, 0, "RUNNING", True),
        (1, 2, "RUNNING", False),
        (137, 1, "RUNNING", True),
        (137, 1, "COMPLETING", False),
    ],
)
def test_a_script_queues_itself_again_after_a_save_and_after_so_many_crashes(
    tmp_path: Path, code: int, crashes: int, state: str, requeued: bool
) -> None:
    counted = tmp_path / "requeues"
    counted.write_text("crash: before\n" * crashes + "unsaved: before\n" * 5)
    script = Slurm(Profile(crash_requeues=2)).script(job(work=tmp_path), distributed=False)
    process = run_script(script, f"bash -c 'exit {code}'", state)
    assert (process.communicate(timeout=30)[0], process.returncode) == ("requeue 17\n" if requeued else "", code)
    of_crashes = counted.read_text().count("crash: exit code")
    assert of_crashes == (code not in (0, 2, 75) and crashes < 2)


@pytest.mark.parametrize(
    ("code", "before", "requeued"), [(75, 9, True), (138, 2, True), (138, 3, False), (2, 0, False)]
)
def test_a_script_passes_the_signal_on_and_waits_for_the_save(
    tmp_path: Path, code: int, before: int, requeued: bool
) -> None:
    """The step notes the signal, takes a while, and ends with `code`: what the script ends with. One that saved nothing is
    queued again three times, whatever crashed before.
    """
    (tmp_path / "requeues").write_text("unsaved: before\n" * before + "crash: before\n" * 5)
    script = Slurm().script(job(work=tmp_path), distributed=False)
    step = f"""bash -c 'trap "sleep 0.3; echo saved; exit {code}" USR1; echo ready; while :; do sleep 0.05; done'"""
    process = run_script(script, step)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=30)
    assert (rest, process.returncode) == ("saved\nrequeue 17\n" if requeued else "saved\n", code)


@pytest.mark.parametrize("before", [[], [signal.SIGUSR1], [signal.SIGUSR1, signal.SIGUSR1]])
def test_a_scheduler_s_warning_asks_and_is_no_first_signal_that_makes_the_next_one_kill(before: list[int]) -> None:
    """Of two that wait at the same moment Python hands over SIGUSR1 first, whichever came first."""
    interrupts = Interrupts()
    for number in [*before, signal.SIGTERM]:
        interrupts.handle(number, None)
    assert interrupts.asked and not interrupts.insisted
    interrupts.handle(signal.SIGUSR1, None)
    assert not interrupts.insisted
    interrupts.handle(signal.SIGTERM, None)
    assert interrupts.insisted


def test_a_step_of_a_scheduler_is_killed_by_ctrl_c_twice_only() -> None:
    interrupts = Interrupts(SCHEDULER_ASKS)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        interrupts.handle(number, None)
        assert interrupts.asked and not interrupts.insisted
    interrupts.handle(signal.SIGINT, None)
    assert interrupts.insisted


# srun


def test_srun_starts_one_torchrun_per_node_that_leaves_signals_to_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert LAUNCHERS["srun"].command(job(launcher="srun", processes=8, nodes=2)) == [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=12",
        "--kill-on-bad-exit=1",
        "env",
        "--ignore-signal=INT,TERM,USR1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT",
        program("torchrun"),
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={socket.gethostname()}:{20000 + zlib.crc32(b'17 /store/work/sft-0000000a') % 9000}",
        "--rdzv-id=slipway-0000000a",
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "-m",
        "pipeline.running.worker",
        "/store/work/sft-0000000a",
    ]


def test_srun_never_runs_on_fewer_nodes_than_the_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(LaunchError, match=r"there is none here. Use `slipway submit`"):
        LAUNCHERS["srun"].command(job(launcher="srun", nodes=2))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(LaunchError, match="has 2 nodes, and the allocation 17 has 1"):
        LAUNCHERS["srun"].command(job(launcher="srun", nodes=2))


@pytest.mark.parametrize(
    ("resources", "launcher"),
    [
        ({"nodes": 2, "launcher": "torchrun"}, "srun"),
        ({"nodes": 1, "launcher": "torchrun"}, "torchrun"),
        ({"nodes": 2, "launcher": {"kind": "torchrun", "rendezvous": "n1:29500"}}, "torchrun"),
        ({"nodes": 2, "launcher": "deepspeed"}, "deepspeed"),
        ({"nodes": 1}, "local"),
    ],
)
def test_several_nodes_meet_through_srun_where_the_recipe_names_no_place(resources: Any, launcher: str) -> None:
    assert Slurm().adapted(job(**resources)).resources.launcher_name == launcher


# Trials


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-12", 60 * 60), ("2-12:30", 3630), ("1-00:00:30", 1440.5)],
)
def test_a_time_of_slurm_in_minutes(time: str, expected: float) -> None:
    assert minutes(time) == expected


def test_what_a_profile_asks_for_is_tried_once_for_each_that_differs(tmp_path: Path) -> None:
    """Without GPUs nothing else is asked of steps on CPUs, but where the profile says so."""
    kinds = {kind: stage.distributed for kind, stage in STAGES.items()}
    read = profile(tmp_path, "gpus: gres\ncpu: {partition: cpu}\nstages: {sft: {time: '30'}, clean: {time: '5'}}")
    found = {each.what: (each.request.partition, each.on_gpu) for each in requests(Slurm(read), kinds)}
    assert found == {
        "steps that train": (None, True),
        "steps on CPUs": ("cpu", False),
        "steps of kind sft": (None, True),
        "steps of kind clean": ("cpu", False),
    }
    assert [each.what for each in requests(Slurm(), kinds)] == ["steps that train"]


def test_where_a_profile_has_no_gpus_what_is_tried_is_what_scripts_ask_for(tmp_path: Path) -> None:
    read = Slurm(profile(tmp_path, "partition: gpu\ncpu: {partition: cpu}\nstages: {sft: {time: '30'}}"))
    (every, sft) = requests(read, {"sft": True})
    assert (every.request.partition, every.on_gpu, sft.request.partition) == ("cpu", False, "cpu")
    assert "--partition=cpu" in options(read.script(job(), distributed=True))


def test_a_trial_asks_for_what_jobs_ask_for_but_for_a_short_time(tmp_path: Path) -> None:
    read = profile(
        tmp_path, 'partition: gpu\ntime: "1-00"\ngpus: gres:a100\nsetup: ["module load cuda"]\ninterface: ib0\n'
    )
    script = trial_script(Slurm(read), requests(Slurm(read), {})[0], 2, Path("/store/it's"))
    assert options(script) == [
        "--job-name=slipway-doctor",
        '--chdir="/store/it\'s"',
        "--output=slipway-doctor.log",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:a100:1",
        "--time=10",
        "--partition=gpu",
        "--no-requeue",
    ]
    shell = script.splitlines()[-5:]
    assert shell[:3] == ["module load cuda", "export NCCL_SOCKET_IFNAME=ib0", "export GLOO_SOCKET_IFNAME=ib0"]
    assert shlex.split(shell[-1])[1:] == ["-m", "launch.clusters.trial", "/store/it's", "2", "nccl"]
    shorter = read.model_copy(update={"time": "5:30"})
    assert "--time=5:30" in options(trial_script(Slurm(shorter), requests(Slurm(shorter), {})[0], 1, tmp_path))


# Chains


@dataclass
class Paper:
    """A scheduler that only notes: what it is asked, and which jobs it is said to have."""

    jobs: dict[str, Queued] = field(default_factory=dict)
    asked: list[tuple[str, Sequence[str]]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def adapted(self, job: Job) -> Job:
        return job

    def script(self, job: Job, *, distributed: bool) -> str:
        return f"run {job.step}\n"

    def queued(self) -> Mapping[str, Queued]:
        return self.jobs

    def submit(self, script: Path, after: Sequence[str]) -> str:
        self.asked.append((script.read_text().split()[1], list(after)))
        job_id = str(100 + len(self.asked))
        self.jobs[str(script.parent)] = Queued(job_id, "PENDING", "Dependency", "")
        return job_id

    def let_go(self, queued: Queued) -> bool:
        return "held" in queued.reason

    def cancel(self, job_ids: Sequence[str]) -> None:
        self.cancelled += job_ids


def test_each_step_waits_for_what_it_reads_and_is_submitted_once(tmp_path: Path) -> None:
    """`joined` reads `first` and `second`. A second submission keeps what is queued, also once a step of it is made."""
    plan, store = planned(tmp_path)
    scheduler, said = Paper(), []
    assert submit(plan, store, scheduler, said.append) == 3
    assert scheduler.asked == [("first", []), ("second", []), ("joined", ["101", "102"])]
    assert read_job(store.work_folder("joined", plan.step("joined").artifact_id)).step == "joined"
    assert submit(planned(tmp_path)[0], store, scheduler, said.append) == 0
    assert said[-1] == "joined  kept       job 103 pending (Dependency)"
    run(tmp_path, only="first")
    del scheduler.jobs[str(plan.step("joined").work)]
    assert submit(planned(tmp_path)[0], store, scheduler, said.append) == 1
    assert scheduler.asked[3:] == [("joined", ["102"])], "what is made is not waited for"
    assert submit(planned(tmp_path, "first.count=4")[0], store, scheduler, said.append) == 2
    assert scheduler.asked[4:] == [("first", []), ("joined", ["105", "102"])]


def test_a_job_that_could_not_begin_is_let_go_by_submitting_again(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    scheduler, said = Paper(), []
    submit(plan, store, scheduler, said.append)
    scheduler.jobs[str(plan.step("first").work)] = Queued("101", "PENDING", "launch failed requeued held", "")
    assert submit(planned(tmp_path)[0], store, scheduler, said.append) == 0
    assert said[-3:] == [
        "first   released   job 101 pending (launch failed requeued held)",
        "second  kept       job 102 pending (Dependency)",
        "joined  kept       job 103 pending (Dependency)",
    ]


@pytest.mark.parametrize(
    ("reason", "released"),
    [
        ("launch failed requeued held", True),
        ("launch_failed_requeued_held", True),
        ("JobHoldMaxRequeue", True),
        ("JobHeldUser", False),
        ("JobHeldAdmin", False),
        ("Dependency", False),
    ],
)
def test_what_a_person_holds_stays_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, released: bool
) -> None:
    program, asked = tmp_path / "scontrol", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$*" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Slurm().let_go(Queued("7", "PENDING", reason, "")) == released
    assert asked.exists() == released
    if released:
        assert asked.read_text() == "release 7\n"


def test_what_cannot_begin_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    plan, store = planned(tmp_path, only="joined")
    scheduler = Paper()
    with pytest.raises(RecipeError, match=r"needs first, second, which this command does not submit. Leave out --only"):
        submit(plan, store, scheduler, print)
    with alone(store), pytest.raises(StoreError, match="another `slipway submit` is at work here"):
        submit(planned(tmp_path)[0], store, scheduler, print)
    assert scheduler.asked == []


def test_a_dry_run_shows_scripts_and_writes_nothing(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    scheduler, said = Paper(), []
    assert submit(plan, store, scheduler, said.append, dry_run=True) == 0
    assert [line.splitlines()[1] for line in said] == ["run first", "run second", "run joined"]
    assert said[2].splitlines()[0].endswith("<==  # after first, second")
    assert scheduler.asked == []
    assert not store.folder.exists()


def test_cancel_names_the_jobs_of_the_work_folders_it_is_given(tmp_path: Path) -> None:
    plan, store = planned(tmp_path)
    scheduler = Paper()
    submit(plan, store, scheduler, str)
    works = [plan.step(name).work for name in ("first", "joined")]
    assert [line.split(":")[0] for line in cancel(works, scheduler)] == [f"cancelled {each.name}" for each in works]
    assert scheduler.cancelled == ["101", "103"]
    assert cancel([tmp_path], scheduler) == []


def test_status_asks_the_scheduler_only_of_submitted_steps(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"state": "not made"}, {"state": "not made", "work": "/w"}]
    asked = {"/w": Queued("7", "PENDING", "Priority", "")}
    found, notes = with_queue([dict(each) for each in entries], lambda: asked)
    assert notes == []
    assert [each["state"] for each in found] == ["not made", "queued"]
    assert found[1]["message"] == "job 7 pending (Priority)"

    def fails() -> Mapping[str, Any]:
        raise LaunchError(Problem("squeue", "there is no such program here"))

    assert with_queue(entries[:1], fails) == (entries[:1], [])
    assert with_queue(entries, fails)[1] == [
        "what became of submitted steps is not known: squeue: there is no such program here."
    ]
