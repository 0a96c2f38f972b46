"""Processes started by torchrun: on one node, or by the same command on each of several."""

from __future__ import annotations

from launch.base import WORKER, LocalProcess, launcher_field, options_of, script
from pipeline.errors import LaunchError, Problem
from pipeline.settings.strict import Strict
from pipeline.store.job import Job


class TorchrunOptions(Strict):
    """What a recipe may tell torchrun."""

    rendezvous: str | None = None
    """`host:port` of the first node, where the nodes meet; needed for more than one."""


class Torchrun(LocalProcess):
    name = "torchrun"
    options = TorchrunOptions

    def command(self, job: Job) -> list[str]:
        resources = job.resources
        rendezvous = options_of(job, self.name, TorchrunOptions).rendezvous
        if resources.nodes == 1:
            meeting = ["--standalone"]
        elif rendezvous:
            run_id = f"slipway-{job.artifact_id[:8]}"
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={run_id}"]
        else:
            where = f"{launcher_field(job)}.rendezvous"
            hint = "Write `launcher: {kind: torchrun, rendezvous: first-node:29500}`, and run the printed command on each node."
            raise LaunchError(Problem(where, f"is required for {resources.nodes} nodes with torchrun", hint))
        processes = [f"--nnodes={resources.nodes}", f"--nproc-per-node={resources.processes}"]
        return [script("torchrun"), *meeting, *processes, "--max-restarts=0", "-m", WORKER, job.work]
