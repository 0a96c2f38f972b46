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
from pipeline.store.resumable import STATE, Saved, Spread, converted, mismatch, obstacle, read_saved, spread_of
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


NO_ZERO = {"zero_optimization": {"stage": 0}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}}
OF_NVME = {"world_size": 2, "zero_stage": 3, "bound": "under ZeRO-3 offloaded to NVMe"}


@pytest.mark.parametrize(
    ("saved", "resources", "reason", "way_out"),
    [
        (
            {"world_size": 1, "zero_stage": 0}, "deepspeed: {no_zero}",
            "1 process without DeepSpeed, and this run is 1 process under DeepSpeed without ZeRO",
            "--set stages.joined.resources.deepspeed=null",
        ),
        (
            {"world_size": 4, "zero_stage": 3}, "launcher: torchrun, processes: 2, nodes: 2, deepspeed: {nvme}",
            "4 processes under ZeRO-3, and this run is 4 processes under ZeRO-3 offloaded to NVMe",
            "--set stages.joined.resources.deepspeed=zero3",
        ),
        (
            OF_NVME, "processes: 1, deepspeed: {nvme}",
            "2 processes under ZeRO-3 offloaded to NVMe, and this run is 1 process under ZeRO-3 offloaded to NVMe",
            "--set stages.joined.resources.processes=2 --set stages.joined.resources.launcher=torchrun",
        ),
        (
            OF_NVME, "launcher: torchrun, processes: 2, nodes: 2, deepspeed: zero3",
            "2 processes under ZeRO-3 offloaded to NVMe, and this run is 4 processes under ZeRO-3",
            "--set stages.joined.resources.deepspeed={nvme} --set stages.joined.resources.processes=1",
        ),
        (
            {**OF_NVME, "world_size": 3}, "launcher: torchrun, processes: 2, nodes: 2",
            "3 processes under ZeRO-3 offloaded to NVMe, and this run is 4 processes without DeepSpeed",
            ("--set stages.joined.resources.deepspeed={nvme} --set stages.joined.resources.nodes=1"
            " --set stages.joined.resources.processes=3"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_resume_is_blocked_with_a_way_out_that_works(
    tmp_path: Path, saved: dict[str, Any], resources: str, reason: str, way_out: str
) -> None:
    paths = {name: tmp_path / f"its own {name}.json" for name in ("no_zero", "nvme")}
    paths["no_zero"].write_text(json.dumps(NO_ZERO))
    paths["nvme"].write_text(json.dumps(NVME))
    layout = {"layout": str(paths["nvme"])} if "bound" in saved else {}
    before = interrupt(tmp_path, 24, **saved, **layout, total_steps=150)
    chosen = f"joined.resources={{{resources.format(**paths)}}}"
    blocked = again(tmp_path, chosen)
    assert blocked.action == "blocked"
    way_out = way_out.format(nvme=shlex.quote(str(paths["nvme"])))
    assert str(blocked.reason) == (
        f"checkpoint 24 of 150, verified; it was written by {reason}: that cannot be converted; to resume, add {way_out};"
        f" to start over, remove {before.work}/checkpoints"
    )
    added = [word for word in shlex.split(way_out) if word != "--set"]
    assert again(tmp_path, chosen, *added).action == "resume"


@pytest.mark.parametrize(
    ("saved", "resources", "changes"),
    [
        ((2, 0), "{processes: 1}", "written by 2 processes without DeepSpeed, goes on in 1 process without DeepSpeed"),
        ((1, 0), "{launcher: torchrun, processes: 2, deepspeed: zero3}", "goes on in 2 processes under ZeRO-3"),
        ((2, 2), "{processes: 1}", "written by 2 processes under ZeRO-2, goes on in 1 process without DeepSpeed"),
        ((4, 3), "{deepspeed: zero3}", "written by 4 processes under ZeRO-3, goes on in 1 process under ZeRO-3"),
        ((1, 3), "{deepspeed: zero3_offload}", ""),
    ],
)
def test_what_can_resume_does_and_says_where_it_is_not_bit_for_bit(
    tmp_path: Path, saved: tuple[int, int], resources: str, changes: str
) -> None:
    """What is offloaded is cut as what is not."""
    interrupt(tmp_path, 24, world_size=saved[0], zero_stage=saved[1], total_steps=150)
    step = again(tmp_path, f"joined.resources={resources}")
    assert step.action == "resume"
    assert changes in str(step.reason)
    assert ("the same within rounding, not bit for bit" in str(step.reason)) == bool(changes)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"step": 3}', '{"world_size": "2", "zero_stage": 0}', "\0"])
def test_a_checkpoint_that_says_nothing_readable_is_blocked(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    assert read_saved(tmp_path).unreadable
    said = obstacle(tmp_path, Resources(), "t")
    assert said == f"its slipway.json cannot be read; to start over, remove {tmp_path.parent}"


def test_a_checkpoint_of_a_stage_that_trains_nothing_can_always_be_resumed_from(tmp_path: Path) -> None:
    assert read_saved(tmp_path) == Saved()
    assert obstacle(tmp_path, Resources(processes=3), "t") is None
    assert mismatch(Saved(), Spread(8, 3)) is None
    assert converted(Saved(), Spread(8, 3)) == ""


def test_a_memory_layout_is_read_without_its_library(tmp_path: Path) -> None:
    stages = {path.stem: spread_of(Resources(deepspeed=path.stem)) for path in LAYOUTS.glob("*.json")}
    assert stages == {name: Spread(1, int(name[4])) for name in ("zero1", "zero2", "zero3", "zero3_offload")}
    assert spread_of(Resources(processes=3)) == Spread(3, 0)
    path = tmp_path / "own.json"
    for content in ("[]", "{", '{"zero_optimization": {"stage": "auto"}}', '{"zero_optimization": []}'):
        path.write_text(content)
        assert spread_of(Resources(deepspeed=str(path))) is None
    for block, bound in (
        (None, "under DeepSpeed without ZeRO"),
        ({}, "under DeepSpeed without ZeRO"),
        ({"stage": 2}, ""),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ""),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "under ZeRO-3 offloaded to NVMe"),
        ({"stage": 1, "elastic_checkpoint": True}, "under ZeRO-1 with elastic_checkpoint"),
        ({"stage": 2, "round_robin_gradients": True}, "under ZeRO-2 with round_robin_gradients"),
        ({"stage": 2, "round_robin_gradients": False}, ""),
    ):
        path.write_text(json.dumps({} if block is None else {"zero_optimization": block}))
        found = spread_of(Resources(deepspeed=str(path)))
        assert found is not None and found.bound == bound
