"""The training refuses a checkpoint exactly where `plan` says that it cannot be resumed from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pipeline.errors import LaunchError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from pipeline.store.resumable import STATE, obstacle
from stages.lib.training.state import Saved, check_state

LAYOUTS = (None, "zero1", "zero2", "zero3", "zero3_offload")


@pytest.mark.parametrize(("layout", "processes"), list(itertools.product(LAYOUTS, (1, 2))))
def test_plan_and_training_refuse_the_same_checkpoints(tmp_path: Path, layout: str | None, processes: int) -> None:
    resources = Resources(deepspeed=layout, processes=processes)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.path(5).mkdir(parents=True)
    context = Context(
        inputs={}, out=tmp_path, work=tmp_path, resume=checkpoints.path(5), checkpoints=checkpoints, seed=0,
        resources=resources, journal=Journal(tmp_path / "journal.jsonl", writes=False), world=World(0, processes),
        stop_requested=lambda: False,
    )  # fmt: skip
    for zero_stage, world_size in itertools.product(range(4), (1, 2)):
        saved = {"step": 5, "world_size": world_size, "zero_stage": zero_stage}
        (checkpoints.path(5) / STATE).write_text(json.dumps(saved))
        if obstacle(checkpoints.path(5), resources, "t") is None:
            check_state(context, Saved(checkpoints.path(5), saved), {})
        else:
            with pytest.raises(LaunchError):
                check_state(context, Saved(checkpoints.path(5), saved), {})
