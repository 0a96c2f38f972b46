"""Memory layouts hold what is about memory; everything that a recipe decides is `auto`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.strict import CHECKOUT

LAYOUTS = sorted((CHECKOUT / "ds_configs").glob("*.json"))
DECIDED_BY_THE_RECIPE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16.enabled": "auto",
    "fp16.enabled": "auto",
}
LEFT_TO_THE_RECIPE = ("optimizer", "scheduler", "steps_per_print", "data_types", "amp", "wandb", "tensorboard")
"""Blocks that a layout must not hold: they would decide what is trained, or be read by nobody."""


def value_at(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def test_the_four_layouts_are_there() -> None:
    assert {"zero1", "zero2", "zero3", "zero3_offload"} <= {path.stem for path in LAYOUTS}


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_what_the_recipe_decides_is_auto(path: Path) -> None:
    config = json.loads(path.read_bytes())
    assert {name: value_at(config, name) for name in DECIDED_BY_THE_RECIPE} == DECIDED_BY_THE_RECIPE
    assert [name for name in LEFT_TO_THE_RECIPE if name in config] == []


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_a_layout_is_what_its_name_says(path: Path) -> None:
    zero = json.loads(path.read_bytes())["zero_optimization"]
    assert f"zero{zero['stage']}" == path.stem.partition("_")[0]
    assert ("offload_optimizer" in zero) == path.stem.endswith("_offload")


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_zero3_gathers_the_weights_that_are_saved(path: Path) -> None:
    """Without it `save_model` writes no weights under ZeRO-3, and says nothing."""
    zero = json.loads(path.read_bytes())["zero_optimization"]
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    else:
        assert not [name for name in zero if name.startswith("stage3_")]
