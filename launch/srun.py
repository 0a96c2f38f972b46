"""One torchrun on each node of a SLURM allocation, started by srun from its first node."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Sequence

from launch.base import WORKER, LocalProcess, launcher_field, options_of, script
from pipeline.errors import LaunchError, Problem
from pipeline.settings.strict import Strict
from pipeline.store.job import Job

FIRST_PORT = 20000
PORTS = 9000
"""Below those that deepspeed takes, and those that Linux gives away."""
LEFT_ALONE = "--ignore-signal=INT,TERM,USR1"
"""A scheduler signals every process at once. Ranks save then, which may take minutes; torchrun, were it to hear the signal,
would kill them after 30 seconds. Ranks have handlers of their own."""
HEARD = "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT"


class SrunOptions(Strict):
    """What a recipe may tell srun."""

    port: int | None = None
    """On the first node, where the nodes meet. None: one that follows from the job of the allocation and the work folder."""


class Srun(LocalProcess):
    name = "srun"
    options = SrunOptions

    def command(self, job: Job) -> list[str]:
        resources = job.resources
        port = options_of(job, self.name, SrunOptions).port
        require_allocation(job)
        name = f"slipway-{job.artifact_id[:8]}"
        return across_nodes(resources.nodes, resources.processes, name, [WORKER, job.work], port)


def across_nodes(nodes: int, processes: int, name: str, module: Sequence[str], port: int | None = None) -> list[str]:
    """The command that runs a module, with its arguments, in `processes` on each of `nodes` of the allocation that this
    process stands on the first node of.

    `name` is that of the meeting; without a `port` it follows from the last argument and the allocation.
    """
    srun = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
        # Else srun, since SLURM 22.05, binds each task to one core whatever the allocation has.
        srun.append(f"--cpus-per-task={cores}")
    # Two jobs may share a node, and two clusters a machine.
    port = port or FIRST_PORT + zlib.crc32(f"{os.environ['SLURM_JOB_ID']} {module[-1]}".encode()) % PORTS
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={socket.gethostname()}:{port}", f"--rdzv-id={name}"]
    counts = [f"--nnodes={nodes}", f"--nproc-per-node={processes}", "--max-restarts=0"]
    torchrun = [script("torchrun"), *meeting, *counts, "-m", *module]
    return ["srun", *srun, "--kill-on-bad-exit=1", "env", LEFT_ALONE, HEARD, *torchrun]


def require_allocation(job: Job) -> None:
    """Raises `LaunchError` where this process does not stand on a node of an allocation that is large enough: nothing is ever
    run on this machine alone instead.
    """
    where, wanted = launcher_field(job), job.resources.nodes
    if "SLURM_JOB_ID" not in os.environ:
        what = f"srun starts {wanted} node(s) of an allocation, and there is none here"
        hint = "Use `slipway submit`, or run the command inside `salloc` or a batch script."
        raise LaunchError(Problem(where, what, hint))
    given = os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    if given.isdigit() and int(given) < wanted:
        what = f"the step has {wanted} nodes, and the allocation {os.environ['SLURM_JOB_ID']} has {given}"
        raise LaunchError(Problem(where, what, f"Ask for `--nodes={wanted}`, or lower resources.nodes."))
