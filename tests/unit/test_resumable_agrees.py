"""The training refuses a checkpoint exactly where `plan` says that it cannot be resumed from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LaunchError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from pipeline.store.resumable import STATE, obstacle
from stages.lib.training.state import Saved, check_state

NO_ZERO = {"zero_optimization": {"stage": 0}}
NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}}
LAYOUTS = (None, "zero1", "zero3_offload", NO_ZERO, NVME)


@pytest.mark.parametrize(("layout", "processes"), list(itertools.product(LAYOUTS, (1, 2))))
def test_plan_and_training_refuse_the_same_checkpoints(
    tmp_path: Path, layout: str | dict[str, Any] | None, processes: int
) -> None:
    if isinstance(layout, dict):
        (tmp_path / "layout.json").write_text(json.dumps(layout))
        layout = str(tmp_path / "layout.json")
    resources = Resources(deepspeed=layout, processes=processes)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.path(5).mkdir(parents=True)
    context = Context(
        inputs={}, out=tmp_path, work=tmp_path, resume=checkpoints.path(5), checkpoints=checkpoints, seed=0,
        resources=resources, journal=Journal(tmp_path / "journal.jsonl", writes=False), world=World(0, processes),
        stop_requested=lambda: False,
    )  # fmt: skip
    refused, bounds = 0, ("", "under DeepSpeed without ZeRO", "under ZeRO-3 offloaded to NVMe")
    for zero_stage, world_size, bound in itertools.product(range(4), (1, 2), bounds):
        saved = {"step": 5, "world_size": world_size, "zero_stage": zero_stage, "bound": bound}
        (checkpoints.path(5) / STATE).write_text(json.dumps(saved))
        if obstacle(checkpoints.path(5), resources, "t") is None:
            check_state(context, Saved(checkpoints.path(5), saved), {})
        else:
            refused += 1
            with pytest.raises(LaunchError):
                check_state(context, Saved(checkpoints.path(5), saved), {})
    assert 0 < refused < 24
