"""One process, started directly."""

from __future__ import annotations

import sys

from launch.base import WORKER, LocalProcess
from pipeline.store.job import Job


class Local(LocalProcess):
    name = "local"

    def command(self, job: Job) -> list[str]:
        return [sys.executable, "-m", WORKER, job.work]
