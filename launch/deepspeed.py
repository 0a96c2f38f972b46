"""Processes started by the deepspeed launcher: on this node, or on those of a hostfile through pdsh."""

from __future__ import annotations

from launch.base import WORKER, LocalProcess, launcher_field, options_of, script
from pipeline.errors import LaunchError, Problem
from pipeline.settings.strict import OutsideFile, Strict
from pipeline.store.job import Job

FIRST_PORT = 29500
PORTS = 1000


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
            where = [f"--hostfile={hostfile}", f"--num_nodes={resources.nodes}"]
        elif resources.nodes == 1:
            where = ["--num_nodes=1"]
        else:
            place = f"{launcher_field(job)}.hostfile"
            hint = "Write `launcher: {kind: deepspeed, hostfile: path}`; the file has a line `host slots=8` per node."
            raise LaunchError(Problem(place, f"is required for {resources.nodes} nodes with deepspeed", hint))
        port = FIRST_PORT + int(job.artifact_id[:8], 16) % PORTS
        processes = [f"--num_gpus={resources.processes}", f"--master_port={port}"]
        return [script("deepspeed"), *where, *processes, "--module", WORKER, job.work]
