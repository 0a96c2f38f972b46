"""What `plan` says of a step that was interrupted is what `run` does: renamed, or under other processes and memory layouts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.running.plan import Step
from pipeline.running.unfinished import take_over
from pipeline.settings.resources import LAYOUTS, Resources
from pipeline.store.resumable import STATE, Saved, mismatch, obstacle, read_saved, zero_stage_of
from pipeline.store.store import Store
from pipeline.store.work_folder import WorkFolder
from tests.unit.test_plan import RECIPE, planned, run

RENAMED = RECIPE.replace("joined", "renamed")


def interrupt(
    folder: Path, number: int, *overrides: str, text: str = RECIPE, name: str = "joined", **saved: Any
) -> Step:
    """The step with a checkpoint, as a training leaves it that was interrupted."""
    plan, store = planned(folder, *overrides, text=text)
    step = plan.step(name)
    store.begin(step.job("demo", store))
    checkpoints = store.checkpoints(name, step.artifact_id)
    checkpoints.path(number).mkdir(parents=True)
    (checkpoints.path(number) / "weights").write_text("x" * number)
    if saved:
        (checkpoints.path(number) / STATE).write_text(json.dumps({"step": number, **saved}))
    checkpoints.complete(number)
    return step


def again(folder: Path, *overrides: str, text: str = RECIPE, name: str = "joined") -> Step:
    return planned(folder, *overrides, text=text)[0].step(name)


@pytest.mark.slow
def test_a_renamed_step_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The fake stage says from which checkpoint it went on."""
    before = interrupt(tmp_path, 24, world_size=1, zero_stage=0, total_steps=150)
    step = again(tmp_path, text=RENAMED, name="renamed")
    assert (step.action, str(step.reason)) == ("resume", "checkpoint 24 of 150, verified (as joined)")
    assert (step.artifact_id, step.adopts) == (before.artifact_id, before.work)
    code, said = run(tmp_path, text=RENAMED)
    assert code == 0, said
    assert "resumed from checkpoint-24" in said
    assert not before.work.exists()
    assert again(tmp_path, text=RENAMED, name="renamed").action == "skip"


def test_the_newest_checkpoint_counts_whatever_the_name(tmp_path: Path) -> None:
    old = interrupt(tmp_path, 8)
    new = interrupt(tmp_path, 5, text=RENAMED, name="renamed")
    assert str(again(tmp_path).reason) == "checkpoint 8 of 10, verified"
    assert str(again(tmp_path, text=RENAMED, name="renamed").reason) == "checkpoint 8 of 10, verified (as joined)"
    take_over(old.work, new.work, Store(tmp_path / "runs"))
    assert str(again(tmp_path, text=RENAMED, name="renamed").reason) == "checkpoint 8 of 10, verified (as joined)"
    assert [path.name for path in (new.work / "checkpoints").iterdir()] == ["checkpoint-8"]


def test_work_on_another_artifact_is_none_of_its_own(tmp_path: Path) -> None:
    """A folder whose name ends like the artifact's id, with the job of another one, is left where it is."""
    step = interrupt(tmp_path, 8)
    job = json.loads((step.work / "job.json").read_bytes())
    (step.work / "job.json").write_text(json.dumps({**job, "artifact_id": step.artifact_id[:8] + "0" * 56}))
    renamed = again(tmp_path, text=RENAMED, name="renamed")
    assert (renamed.action, renamed.adopts) == ("run", None)


def test_a_step_that_runs_under_its_old_name_is_left_alone(tmp_path: Path) -> None:
    before = interrupt(tmp_path, 8)
    store = Store(tmp_path / "runs")
    with WorkFolder(before.work).locked():
        step = again(tmp_path, text=RENAMED, name="renamed")
        assert step.action == "blocked"
        assert "runs it; log: " in str(step.reason)
        with pytest.raises(StoreError, match="is being run by process"):
            take_over(before.work, step.work, store)
    assert before.work.exists()


@pytest.mark.parametrize(
    ("saved", "resources", "reason", "way_out"),
    [
        (
            (1, 0), "{deepspeed: zero2}",
            "was written without DeepSpeed, and this run is under ZeRO-2",
            "--set stages.joined.resources.deepspeed=null",
        ),
        (
            (1, 2), "{processes: 1}",
            "was written under ZeRO-2, and this run is without DeepSpeed",
            "--set stages.joined.resources.deepspeed=zero2",
        ),
        (
            (2, 2), "{deepspeed: zero2}",
            "was written by 2 processes under ZeRO, and this run has 1",
            "--set stages.joined.resources.processes=2 --set stages.joined.resources.launcher=torchrun",
        ),
        (
            (4, 3), "{launcher: torchrun, processes: 2, nodes: 2, deepspeed: zero1}",
            "was written under ZeRO-3, and this run is under ZeRO-1",
            "--set stages.joined.resources.deepspeed=zero3",
        ),
        (
            (3, 1), "{launcher: torchrun, processes: 2, nodes: 2, deepspeed: zero1}",
            "was written by 3 processes under ZeRO, and this run has 4",
            "--set stages.joined.resources.nodes=1 --set stages.joined.resources.processes=3",
        ),
    ],
)  # fmt: skip
def test_what_cannot_resume_is_blocked_with_a_way_out_that_works(
    tmp_path: Path, saved: tuple[int, int], resources: str, reason: str, way_out: str
) -> None:
    world_size, zero_stage = saved
    before = interrupt(tmp_path, 24, world_size=world_size, zero_stage=zero_stage, total_steps=150)
    blocked = again(tmp_path, f"joined.resources={resources}")
    assert blocked.action == "blocked"
    assert str(blocked.reason) == (
        f"checkpoint 24 of 150, verified; it {reason}; to resume, add {way_out};"
        f" to start over, remove {before.work}/checkpoints"
    )
    added = [word for word in shlex.split(way_out) if word != "--set"]
    assert again(tmp_path, f"joined.resources={resources}", *added).action == "resume"


@pytest.mark.parametrize(
    ("saved", "resources"),
    [
        ((2, 0), "{processes: 1}"),
        ((1, 0), "{launcher: torchrun, processes: 2}"),
        ((1, 3), "{deepspeed: zero3_offload}"),
    ],
)
def test_what_can_resume_does(tmp_path: Path, saved: tuple[int, int], resources: str) -> None:
    """Without ZeRO any number of processes goes on; what is offloaded is cut as what is not."""
    interrupt(tmp_path, 24, world_size=saved[0], zero_stage=saved[1], total_steps=150)
    assert again(tmp_path, f"joined.resources={resources}").action == "resume"


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"step": 3}', '{"world_size": "2", "zero_stage": 0}', "\0"])
def test_a_checkpoint_that_says_nothing_readable_is_blocked(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    assert read_saved(tmp_path).unreadable
    said = obstacle(tmp_path, Resources(), "t")
    assert said == f"its slipway.json cannot be read; to start over, remove {tmp_path.parent}"


def test_a_checkpoint_of_a_stage_that_trains_nothing_can_always_be_resumed_from(tmp_path: Path) -> None:
    assert read_saved(tmp_path) == Saved()
    assert obstacle(tmp_path, Resources(processes=3), "t") is None
    assert mismatch(Saved(), 3, 8) is None


def test_the_zero_stage_of_a_layout_is_read_without_its_library(tmp_path: Path) -> None:
    stages = {path.stem: zero_stage_of(path) for path in LAYOUTS.glob("*.json")}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
    assert (zero_stage_of(None), zero_stage_of("zero2")) == (0, 2)
    for content, expected in (("{}", 0), ("[]", None), ("{", None), ('{"zero_optimization": {"stage": "auto"}}', None)):
        (tmp_path / "own.json").write_text(content)
        assert zero_stage_of(tmp_path / "own.json") == expected
