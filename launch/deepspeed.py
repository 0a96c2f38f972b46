"""Processes started by the deepspeed launcher: on this node, or on those of a hostfile through pdsh."""

from __future__ import annotations

from launch.base import WORKER, LocalProcess, script
from pipeline.errors import LaunchError, Problem
from pipeline.store.job import Job

FIRST_PORT = 29500
PORTS = 1000


class DeepSpeed(LocalProcess):
    def command(self, job: Job) -> list[str]:
        resources = job.resources
        if resources.hostfile:
            where = [f"--hostfile={resources.hostfile}", f"--num_nodes={resources.nodes}"]
        elif resources.nodes == 1:
            where = ["--num_nodes=1"]
        else:
            place = f"stages.{job.step}.resources.hostfile"
            hint = "Write `hostfile: path` with a line `host slots=8` per node."
            raise LaunchError(Problem(place, f"is required for {resources.nodes} nodes with deepspeed", hint))
        port = FIRST_PORT + int(job.artifact_id[:8], 16) % PORTS
        processes = [f"--num_gpus={resources.processes}", f"--master_port={port}"]
        return [script("deepspeed"), *where, *processes, "--module", WORKER, job.work]
