"""Processes started by torchrun: on one node, or by the same command on each of several."""

from __future__ import annotations

from launch.base import WORKER, LocalProcess, script
from pipeline.errors import LaunchError, Problem
from pipeline.store.job import Job


class Torchrun(LocalProcess):
    def command(self, job: Job) -> list[str]:
        resources = job.resources
        if resources.nodes == 1:
            meeting = ["--standalone"]
        elif resources.rendezvous:
            run_id = f"slipway-{job.artifact_id[:8]}"
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={resources.rendezvous}", f"--rdzv-id={run_id}"]
        else:
            where = f"stages.{job.step}.resources.rendezvous"
            hint = "Write `rendezvous: first-node:29500`, and run the printed command on each node."
            raise LaunchError(Problem(where, f"is required for {resources.nodes} nodes with torchrun", hint))
        processes = [f"--nnodes={resources.nodes}", f"--nproc-per-node={resources.processes}"]
        return [script("torchrun"), *meeting, *processes, "--max-restarts=0", "-m", WORKER, job.work]
