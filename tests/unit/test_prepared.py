"""A job that was prepared before waits for another run of its step, and makes nothing twice."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.running.prepared import execute_job
from pipeline.running.progress import Progress
from pipeline.store.job import Job
from pipeline.store.store import Store
from tests.unit.fake_stages import STAGES
from tests.unit.test_plan import ROOT, FakeStageProcess, planned


def prepared(folder: Path) -> tuple[Job, Store]:
    plan, store = planned(folder)
    job = plan.step("first").job("demo", store)
    store.begin(job)
    return job, store


@contextmanager
def holder(job: Job, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the step for so long."""
    script = (
        "import time; from pathlib import Path; from pipeline.store.work_folder import WorkFolder\n"
        f"with WorkFolder(Path({job.work!r})).locked(): print('held', flush=True); time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run(job: Job, wait_seconds: float) -> tuple[int, str]:
    stream = io.StringIO()
    return execute_job(job, STAGES, {"local": FakeStageProcess()}, Progress(stream), wait_seconds), stream.getvalue()


def test_it_waits_for_another_run_and_then_makes_the_artifact_once(tmp_path: Path) -> None:
    job, store = prepared(tmp_path)
    with holder(job, 1.0) as other:
        code, said = run(job, 60.0)
    assert code == 0
    assert f"first  waits for process {other.pid} on " in said
    assert store.find(job.artifact_id)
    code, said = run(job, 60.0)
    assert code == 0
    assert "is made already" in said


def test_it_gives_up_when_the_other_one_does_not_end(tmp_path: Path) -> None:
    job, _ = prepared(tmp_path)
    with holder(job, 60.0) as other, pytest.raises(StoreError, match=f"is being run by process {other.pid}"):
        run(job, 0.6)
