"""What a step does to this machine: cores and memory of its ranks here, and the GPUs that they may use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from pipeline.store.job import Job
from pipeline.store.journal import Journal

MEASURE_SECONDS = 15.0
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,utilization.gpu,memory.used", "--format=csv,noheader,nounits")
GIB = 2**30


@dataclass
class SystemFigures:
    """Writes lines `{"event": "system", "step": ..., "memory_gib": ...}` into a journal of their own."""

    job: Job
    measured_at: float = field(default_factory=time.monotonic)
    step: int = 0
    cpu_seconds: dict[int, float] = field(default_factory=dict)

    def write_if_due(self, step: int) -> None:
        """Measures every `MEASURE_SECONDS`, once for a training step."""
        now = time.monotonic()
        if step <= self.step or now - self.measured_at < MEASURE_SECONDS:
            return
        seconds, self.measured_at, self.step = now - self.measured_at, now, step
        Journal(self.job.files.system_journal, writes=True).write(
            "system", step=step, **self.of_processes(seconds), **dict(of_gpus())
        )

    def of_processes(self, seconds: float) -> dict[str, float]:
        """Cores that the job's processes on this machine kept busy since last time, and their memory."""
        before, self.cpu_seconds, resident = self.cpu_seconds, {}, 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self.cpu_seconds[process.pid] = times.user + times.system
                resident += process.memory_info().rss
        spent = sum(max(0.0, now - before.get(pid, 0.0)) for pid, now in self.cpu_seconds.items())
        cores = {"cores_busy": round(spent / seconds, 2)} if before else {}
        return {**cores, "memory_gib": round(resident / GIB, 3)}

    def processes(self) -> Iterator[psutil.Process]:
        """The ranks of the job on this machine, and what they have started: this process is a child of one of them."""
        with contextlib.suppress(psutil.Error):
            rank = psutil.Process().parent()
            above = rank.parent() if rank else None
            siblings = [each for each in above.children() if self.job.work in each.cmdline()] if above else []
            for each in siblings or filter(None, [rank]):
                yield each
                yield from each.children(recursive=True)


def of_gpus() -> Iterator[tuple[str, float]]:
    """(name, number) of use and memory of each GPU that the job may use; none where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else {each.strip() for each in visible.split(",")}
    if allowed == {""}:
        return
    try:
        said = subprocess.run(QUERY, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in said.splitlines():
        index, uuid, use, memory = (each.strip() for each in line.split(","))
        if allowed is None or index in allowed or uuid in allowed:
            with contextlib.suppress(ValueError):
                yield f"gpu_{index}_use_percent", float(use)
                yield f"gpu_{index}_memory_gib", round(float(memory) / 1024, 3)
