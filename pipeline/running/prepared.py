"""Runs a job that was prepared before, by `slipway submit` or `slipway job`: what `slipway step` does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import EXIT_DONE
from pipeline.running.execute import Interrupts, Launcher, run_job
from pipeline.running.progress import Progress
from pipeline.stage import Stage
from pipeline.store.job import Job
from pipeline.store.store import Store

WAIT_SECONDS = 600.0
"""How long the job waits for another run of its step, such as one on a node that SLURM has given up, to end."""
POLL_SECONDS = 0.5


def execute_job(
    job: Job,
    stages: Mapping[str, Stage],
    launchers: Mapping[str, Launcher],
    progress: Progress,
    wait_seconds: float = WAIT_SECONDS,
) -> int:
    """Runs the job, once nobody else does, and returns the exit code of the command. What is made already is not made again."""
    store = Store(Path(job.store))
    with Interrupts() as interrupts:
        wait_for_others(job, progress, interrupts, wait_seconds)
        if interrupts.count:
            return interrupts.exit_code
        if store.find(job.artifact_id):
            progress.line(f"{job.step}  skip  {store.artifact_folder(job.artifact_id)} is made already")
            return EXIT_DONE
        progress.line(f"{job.step}  run  {job.work}")
        return run_job(job, stages[job.kind], store, launchers, progress, interrupts)


def wait_for_others(job: Job, progress: Progress, interrupts: Interrupts, seconds: float) -> None:
    """Returns once no other process runs the step, we are asked to stop, or have waited so long."""
    deadline = time.monotonic() + seconds
    said = ""
    while (running := job.files.running()) and not interrupts.count and time.monotonic() < deadline:
        if running.who != said:
            said = running.who
            progress.line(f"{job.step}  waits for {said}, which runs it, for {seconds:.0f} s at most")
        time.sleep(POLL_SECONDS)
