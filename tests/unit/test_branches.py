"""Several steps at a time: what may begin, what does not any more, and who gets which GPUs."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, Problem, StoreError
from pipeline.running.branches import Branches, Devices, gpus_here
from pipeline.running.execute import execute
from pipeline.running.interrupts import Interrupts
from pipeline.running.plan import Step
from pipeline.running.progress import Progress
from pipeline.store.artifact import read_manifest
from tests.unit.test_plan import FakeStageProcess, planned

LONGEST_SECONDS = 20.0


def run(
    folder: Path, start: Any, interrupts: Interrupts | None = None, jobs: int = 2, **choice: str
) -> tuple[int, str]:
    """What the demo recipe ends with: `joined` reads `first` and `second`."""
    stream = io.StringIO()
    plan, store = planned(folder, **choice)

    def is_made(name: str) -> bool:
        return store.find(plan.step(name).artifact_id) is not None

    branches = Branches(plan, start, is_made, Progress(stream), interrupts or Interrupts(), jobs, Devices([]))
    return branches.run(), stream.getvalue()


def test_steps_that_do_not_read_each_other_run_at_the_same_time(tmp_path: Path) -> None:
    """Each of the two waits for the other: one after the other they would never end."""
    both, ended = threading.Barrier(2), []

    def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
        if step.name != "joined":
            both.wait(LONGEST_SECONDS)
        progress.line("  goes on")
        ended.append(step.name)
        return EXIT_DONE

    code, said = run(tmp_path, start)
    assert code == 0
    assert sorted(ended[:2]) == ["first", "second"]
    assert ended[2] == "joined"
    assert "first | run  not made yet\n" in said
    assert "joined | goes on\n" in said


def test_no_more_steps_run_than_jobs_are_allowed(tmp_path: Path) -> None:
    running, most = 0, 0

    def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return EXIT_DONE

    assert run(tmp_path, start, jobs=1)[0] == 0
    assert most == 1


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((EXIT_CRASH, EXIT_DONE), EXIT_CRASH),
        ((EXIT_PREEMPTED, EXIT_DONE), EXIT_PREEMPTED),
        ((EXIT_PREEMPTED, EXIT_USER_ERROR), EXIT_USER_ERROR),
    ],
)
def test_after_a_failure_what_runs_goes_on_and_nothing_begins(
    tmp_path: Path, codes: tuple[int, int], code: int
) -> None:
    both, begun = threading.Barrier(2), []

    def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
        begun.append(step.name)
        both.wait(LONGEST_SECONDS)
        return dict(zip(("first", "second"), codes, strict=True))[step.name]

    assert run(tmp_path, start)[0] == code
    assert sorted(begun) == ["first", "second"]


def test_when_asked_to_stop_nothing_begins(tmp_path: Path) -> None:
    interrupts = Interrupts()

    def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
        interrupts.handle(signal.SIGINT, None)
        return EXIT_DONE

    code, said = run(tmp_path, start, interrupts, jobs=1)
    assert code == 130
    assert "stopped before second began; the same command goes on from here" in said


def test_a_step_whose_input_is_missing_is_said_to_be_blocked(tmp_path: Path) -> None:
    code, said = run(tmp_path, lambda *_: EXIT_DONE, only="joined")
    assert code == EXIT_USER_ERROR
    assert "joined | blocked  needs first, second" in said


def test_an_error_of_one_step_has_the_other_save_before_it_is_raised(tmp_path: Path) -> None:
    both, interrupts, saved = threading.Barrier(2), Interrupts(), []

    def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
        both.wait(LONGEST_SECONDS)
        if step.name == "first":
            raise StoreError(Problem("runs", "cannot be written"))
        while not interrupts.asked:
            time.sleep(0.01)
        saved.append(step.name)
        return EXIT_PREEMPTED

    with pytest.raises(StoreError, match="cannot be written"):
        run(tmp_path, start, interrupts)
    assert saved == ["second"]


def test_two_at_a_time_make_what_one_after_the_other_makes(tmp_path: Path) -> None:
    made = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        plan, store = planned(folder)
        assert execute(plan, store, {"local": FakeStageProcess()}, Progress(io.StringIO()), jobs=jobs) == 0
        made.append({each: read_manifest(store.artifact_folder(each)).files for each in store.all_ids()})
    assert made[0] == made[1]
    assert len(made[0]) == 3


def step_of(folder: Path, **resources: Any) -> Step:
    """A step with these resources; `joined` may run in several processes."""
    listed = ", ".join(f"{name}: {value}" for name, value in resources.items())
    text = f"""
name: demo
outputs: [joined]
stages:
  first: {{kind: write}}
  joined: {{kind: join, inputs: {{data: first}}, resources: {{{listed}}}}}
"""
    return planned(folder, text=text)[0].step("joined")


def test_each_step_gets_gpus_of_its_own(tmp_path: Path) -> None:
    devices = Devices(["4", "5", "7"])
    two = step_of(tmp_path, device="cuda", launcher="torchrun", processes=2)
    one = step_of(tmp_path, device="cuda")
    assert devices.take(two) == ["4", "5"]
    assert devices.take(two) is None
    assert devices.take(one) == ["7"]
    assert devices.take(step_of(tmp_path, device="cpu")) == []
    devices.give_back(["4", "5"])
    assert devices.take(one) == ["4"]


def test_the_gpus_are_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"0000:{number}").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_here(tmp_path) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 5,GPU-8f3a ")
    assert gpus_here(tmp_path) == ["5", "GPU-8f3a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus_here(tmp_path) == []
