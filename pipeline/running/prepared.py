"""Runs a job that was prepared before, by `slipway submit` or `slipway job`: what `slipway step` does."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from pipeline.running.execute import Launcher, run_job
from pipeline.running.interrupts import Interrupts
from pipeline.running.progress import Progress
from pipeline.stage import Stage
from pipeline.store.job import Job
from pipeline.store.store import Store

WAIT_SECONDS = 600.0
"""How long the job waits for another run of its step, such as one on a node that SLURM has given up, to end."""
SCHEDULER_ASKS = frozenset({signal.SIGUSR1, signal.SIGTERM})
"""A scheduler that takes a job away says so more than once, before a save can be done, and ends with SIGKILL by itself."""


def execute_job(
    job: Job,
    stages: Mapping[str, Stage],
    launchers: Mapping[str, Launcher],
    progress: Progress,
    wait_seconds: float = WAIT_SECONDS,
) -> int:
    """Runs the job, once nobody else does, and returns the exit code of the command. What is made already is not made again."""
    store = Store(Path(job.store))
    with Interrupts(only_ask=SCHEDULER_ASKS) as interrupts:
        progress.line(f"{job.step}  run  {job.work}")
        return run_job(job, stages[job.kind], store, launchers, progress, interrupts, wait_seconds=wait_seconds)
