"""SLURM as the scheduler that `slipway submit` hands jobs to: what is asked of it goes through its own commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.clusters.profile import Profile, Request, minutes
from launch.clusters.script import batch_script
from launch.srun import Srun
from launch.torchrun import Torchrun
from pipeline.errors import LaunchError, Problem
from pipeline.store.job import Job

TIMEOUT_SECONDS = 60.0
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)
"""States of jobs that end or have ended: none of them makes its artifact any more."""
SCANCEL_AT_ONCE = 200
HELD_BY_SLURM = frozenset({"launch failed requeued held", "JobHoldMaxRequeue"})
"""Reasons for which SLURM holds a job that nobody has held: it could not be begun on its nodes, once or too often."""


@dataclass(frozen=True)
class Queued:
    """A job of this user that waits or runs."""

    job_id: str
    state: str
    reason: str
    nodes: str

    def __str__(self) -> str:
        if self.nodes:
            return f"job {self.job_id} {self.state.lower()} on {self.nodes}"
        return f"job {self.job_id} {self.state.lower()}{f' ({self.reason})' if self.reason not in ('', 'None') else ''}"


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster, as `sinfo` tells it. Prints itself."""

    name: str
    is_default: bool
    state: str
    limit: str
    """Longest time of a job."""
    default_time: str
    """Time of a job that asks for none."""
    nodes: Mapping[str, int]
    """State of nodes -> how many of them."""

    def __str__(self) -> str:
        nodes = ", ".join(f"{count} {state}" for state, count in self.nodes.items())
        state = "" if self.state == "up" else f" is {self.state}"
        return f"partition {self.name}{state} ({nodes} nodes, at most {self.limit})"

    @property
    def limit_minutes(self) -> float | None:
        """None: any time."""
        return minutes(self.limit) if self.limit[:1].isdigit() else None


@dataclass(frozen=True)
class Slurm:
    """The cluster that `profile` describes; of what is queued, one needs to know nothing."""

    profile: Profile = field(default_factory=Profile)

    def adapted(self, job: Job) -> Job:
        """The job as the cluster runs it: several nodes that have no other way to meet are started by srun."""
        resources = job.resources
        meets_by_itself = resources.launcher_name not in ("local", Torchrun.name) or resources.launcher_options
        if resources.nodes == 1 or meets_by_itself:
            return job
        return job.model_copy(update={"resources": resources.model_copy(update={"launcher": Srun.name})})

    def script(self, job: Job, *, distributed: bool) -> str:
        """The batch script of the job. Raises a `SlipwayError` where the profile does not say enough."""
        _, on_gpu = self.request(job.kind, may_use_gpu=distributed and job.resources.device != "cpu")
        if distributed and job.resources.device == "cuda" and not on_gpu:
            hint = "Write `gpus: gpus-per-node` (or `gres`) in the profile."
            raise LaunchError(
                Problem(f"stages.{job.step}.resources.device", "is cuda, and the profile asks for no GPUs", hint)
            )
        return batch_script(job, self.profile, on_gpu=on_gpu)

    def request(self, kind: str, *, may_use_gpu: bool) -> tuple[Request, bool]:
        """What a job of this kind of stage asks for, and whether for GPUs: where the profile has none, all jobs are CPU jobs."""
        on_gpu = may_use_gpu and bool(self.profile.request(kind, on_gpu=True).gpus)
        return self.profile.request(kind, on_gpu=on_gpu), on_gpu

    def queued(self) -> dict[str, Queued]:
        """Working folder -> job, of this user's jobs that wait or run. A step's job works in the step's work folder."""
        found: dict[str, Queued] = {}
        lines = ask("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%N|%Z").splitlines()
        for parts in (line.strip().split("|", 4) for line in lines):
            if len(parts) == 5 and parts[1] not in ENDED:
                found[parts[4]] = Queued(*parts[:4])
        return found

    def partitions(self) -> list[Partition]:
        """The partitions that this user sees."""
        found: dict[str, Partition] = {}
        for line in ask("sinfo", "--noheader", "--format=%P|%a|%l|%L|%T|%D").splitlines():
            name, state, limit, default_time, nodes, count = line.strip().split("|")
            is_default, name = name.endswith("*"), name.removesuffix("*")
            known = found[name].nodes if name in found else {}
            together = {**known, nodes: known.get(nodes, 0) + int(count)}
            default = limit if default_time == "n/a" else default_time
            found[name] = Partition(name, is_default, state, limit, default, together)
        return list(found.values())

    def would_begin(self, options: Sequence[str]) -> str:
        """When and where SLURM would begin a job with these options of sbatch. Raises `LaunchError` if it takes none such."""
        said = asked("sbatch", "--test-only", *options, "--wrap=true").stderr.strip()
        begins = re.search(r"to start at (\S+) .*on nodes (\S+) in partition (\S+)", said)
        return "could begin at {} on {} in partition {}".format(*begins.groups()) if begins else said

    def submit(self, script: Path, after: Sequence[str]) -> str:
        """Submits the script, to begin once the jobs `after` have ended well; returns the job's id."""
        waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        return ask("sbatch", "--parsable", *waits, str(script)).strip().partition(";")[0]

    def let_go(self, queued: Queued) -> bool:
        """Releases a job that SLURM holds after it could not begin; whether it did. What a person holds stays held."""
        if queued.reason.replace("_", " ") not in HELD_BY_SLURM:
            return False
        ask("scontrol", "release", queued.job_id)
        return True

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancels jobs, whether they wait or run; those that run are told to save before."""
        for start in range(0, len(job_ids), SCANCEL_AT_ONCE):
            ask("scancel", *job_ids[start : start + SCANCEL_AT_ONCE])


def ask(*command: str) -> str:
    """What the command prints. Raises `LaunchError` with its complaint if it fails."""
    return asked(*command).stdout


def asked(*command: str) -> subprocess.CompletedProcess[str]:
    """The command, done well. Raises `LaunchError` with its complaint if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, errors="replace")
    except FileNotFoundError:
        hint = "Submit where the commands of SLURM are installed, such as a login node."
        raise LaunchError(Problem(command[0], "there is no such program here", hint)) from None
    except subprocess.TimeoutExpired:
        hint = "`sinfo` tells whether the cluster answers; try again."
        raise LaunchError(Problem(command[0], f"gave no answer in {TIMEOUT_SECONDS:.0f} s", hint)) from None
    if done.returncode != 0:
        lines = [
            line.strip().removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()
        ]
        said = "; ".join(filter(None, lines))
        what = said or f"failed with exit code {done.returncode}"
        raise LaunchError(Problem(command[0], what, "Compare the profile with `sinfo`, then submit again."))
    return done
