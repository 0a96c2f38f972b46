"""Processes started by the deepspeed launcher: on this node, or on those of a hostfile through pdsh."""

from __future__ import annotations

import os

from launch.base import WORKER, LocalProcess, launcher_field, options_of, script
from pipeline.errors import LaunchError, Problem
from pipeline.settings.strict import OutsideFile, Strict
from pipeline.store.job import Job

FIRST_PORT = 29500
PORTS = 1000
VISIBLE = "CUDA_VISIBLE_DEVICES"
HIDE_ALL = ("-1", "NoDevFiles")
"""Names of no GPU: CUDA passes over what comes behind one."""


class DeepSpeedOptions(Strict):
    """What a recipe may tell the deepspeed launcher."""

    hostfile: OutsideFile | None = None
    """A file with a line `host slots=8` per node; needed for more than one."""


class DeepSpeed(LocalProcess):
    name = "deepspeed"
    options = DeepSpeedOptions

    def command(self, job: Job) -> list[str]:
        resources = job.resources
        hostfile = options_of(job, self.name, DeepSpeedOptions).hostfile
        if hostfile:
            require_nothing_hidden(job)
            where = [f"--hostfile={hostfile}", f"--num_nodes={resources.nodes}", f"--num_gpus={resources.processes}"]
        elif resources.nodes == 1:
            where = on_this_node(job)
        else:
            place = f"{launcher_field(job)}.hostfile"
            hint = "Write `launcher: {kind: deepspeed, hostfile: path}`; the file has a line `host slots=8` per node."
            raise LaunchError(Problem(place, f"is required for {resources.nodes} nodes with deepspeed", hint))
        port = FIRST_PORT + int(job.artifact_id[:8], 16) % PORTS
        return [script("deepspeed"), *where, f"--master_port={port}", "--module", WORKER, job.work]


def require_nothing_hidden(job: Job) -> None:
    """Raises `LaunchError` where one node has a hostfile and CUDA_VISIBLE_DEVICES names its GPUs: with a hostfile the launcher
    passes over the variable. On several nodes it is that of the first one at best, and says nothing of the others.
    """
    allowed, resources = os.environ.get(VISIBLE, "").strip(), job.resources
    if allowed and resources.nodes == 1 and not resources.uses_cpu:
        what = f"would have deepspeed pass over {VISIBLE}, which is {allowed}"
        hint = "Leave it out: one node needs none, and the variable then counts."
        raise LaunchError(Problem(f"{launcher_field(job)}.hostfile", what, hint))


def on_this_node(job: Job) -> list[str]:
    """As many processes as the job has, on the GPUs that CUDA_VISIBLE_DEVICES allows: with `--num_gpus` the launcher passes
    over it and takes the first ones, which may be other people's.
    """
    resources, said = job.resources, os.environ.get(VISIBLE)
    if said is None or resources.uses_cpu:
        return ["--num_nodes=1", f"--num_gpus={resources.processes}"]
    where, allowed = launcher_field(job), [name.strip() for name in said.split(",") if name.strip()]
    if not allowed or allowed[0] in HIDE_ALL:
        what = f"{VISIBLE} is {said!r}, which hides all GPUs, and deepspeed would pass over it"
        raise LaunchError(Problem(where, what, f"Name GPUs there, `unset {VISIBLE}`, or write `device: cpu`."))
    if twice := [name for name in dict.fromkeys(allowed) if allowed.count(name) > 1]:
        raise LaunchError(Problem(where, f"{VISIBLE} names {', '.join(twice)} twice", "Name each GPU once."))
    if len(allowed) < resources.processes:
        what = f"{VISIBLE} allows {', '.join(allowed)}, and the step has {resources.processes} processes"
        raise LaunchError(Problem(where, what, "Lower resources.processes, or allow as many GPUs."))
    if not all(name.isdigit() for name in allowed):
        what = f"deepspeed knows GPUs by their numbers, and {VISIBLE} is {','.join(allowed)}"
        raise LaunchError(Problem(where, what, "Use the launcher torchrun, or write numbers."))
    return [f"--include=localhost:{','.join(allowed[: resources.processes])}"]
