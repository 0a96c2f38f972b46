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
    assert f"waits for process {other.pid} on " in said
    assert store.find(job.artifact_id)
    code, said = run(job, 60.0)
    assert code == 0
    assert "is made already" in said


def test_it_gives_up_when_the_other_one_does_not_end(tmp_path: Path) -> None:
    job, _ = prepared(tmp_path)
    with holder(job, 60.0) as other, pytest.raises(StoreError, match=f"is being run by process {other.pid}"):
        run(job, 0.6)


TWO = """
import sys
from pathlib import Path
from pipeline.running.execute import execute
from pipeline.running.progress import Progress
from tests.unit.test_plan import FakeStageProcess, planned
plan, store = planned(Path(sys.argv[1]))
print("planned", flush=True)
sys.stdin.readline()
sys.exit(execute(plan, store, {"local": FakeStageProcess()}, Progress(), jobs=int(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_two_runs_at_the_same_moment_both_end_well_and_make_each_artifact_once(tmp_path: Path, jobs: int) -> None:
    """Both have planned before either begins: what decides is who holds a step."""
    command = [sys.executable, "-c", TWO, str(tmp_path), str(jobs)]
    runs = []
    for _ in range(2):
        each = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert each.stdout is not None and each.stdout.readline() == "planned\n"
        runs.append(each)
    for each in runs:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = [each.communicate(timeout=120)[0] for each in runs]
    assert [each.returncode for each in runs] == [0, 0], said
    made = [line for text in said for line in text.splitlines() if "made " in line and " in 0" in line]
    assert len(made) == 3, said
    _, store = planned(tmp_path)
    assert len(store.all_ids()) == 3
