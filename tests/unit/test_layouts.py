"""Memory layouts: what the recipe decides is in the DeepSpeed config, whatever a user's own file says or leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.settings.resources import Resources
from stages.lib.training.layouts import complete_layout, fit_to_width
from stages.lib.training.params import Batch, OptimizerParams, TrainingParams

PARAMS = OptimizerParams(learning_rate=1e-3, max_gradient_norm=0.5, precision="bf16")
BATCH = Batch(global_batch_size=16, micro_batch_size=2, accumulation=4, processes=2)


def complete(folder: Path, layout: dict[str, Any], params: OptimizerParams = PARAMS) -> dict[str, Any]:
    path = folder / "own.json"
    path.write_text(json.dumps(layout), encoding="utf-8")
    completed = complete_layout(Resources(deepspeed=str(path)), params, BATCH)
    assert completed is not None
    return completed


def test_no_layout_stays_none() -> None:
    assert complete_layout(Resources(), PARAMS, BATCH) is None
    assert fit_to_width(None, 64) is None


def test_what_a_file_leaves_out_is_what_the_recipe_says(tmp_path: Path) -> None:
    """Without gradient_clipping DeepSpeed would clip nothing, and without bf16 train in float32."""
    completed = complete(tmp_path, {"zero_optimization": {"stage": 2}})
    assert completed["gradient_clipping"] == 0.5
    assert completed["train_batch_size"] == 16
    assert completed["train_micro_batch_size_per_gpu"] == 2
    assert completed["gradient_accumulation_steps"] == 4
    assert completed["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert completed["fp16"] == {"enabled": False}
    assert completed["zero_optimization"] == {"stage": 2}


def test_a_file_that_contradicts_the_recipe_is_refused_as_a_whole(tmp_path: Path) -> None:
    own = {
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "train_batch_size": "auto",
        "optimizer": {"type": "Adam", "params": {"lr": 1e-5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
    }
    with pytest.raises(RecipeError) as caught:
        complete(tmp_path, own)
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 7
    assert any("its gradient_clipping is 1.0, and the recipe makes it 0.5" in line for line in said)
    assert any("its optimizer.type is 'Adam', and the recipe makes it 'AdamW'" in line for line in said)
    assert any("its optimizer.params.lr is 1e-05, and the recipe makes it 0.001" in line for line in said)
    assert any("its scheduler.type is 'WarmupLR', and the recipe makes it schedule: cosine" in line for line in said)
    assert any("its scheduler.params.warmup_num_steps is 7, and the recipe makes it 0" in line for line in said)
    assert all('"auto"' in line or "Remove the block" in line for line in said)


def test_the_way_out_of_a_refusal_works(tmp_path: Path) -> None:
    completed = complete(tmp_path, {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "optimizer": None})
    assert completed["gradient_clipping"] == 0.5 and completed["bf16"]["enabled"] is True


AUTO = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize(
    ("kind", "schedule", "fields"),
    [
        ("WarmupLR", "constant", AUTO),
        ("WarmupLR", "constant", {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 3}),
        ("WarmupDecayLR", "linear", AUTO | {"total_num_steps": "auto"}),
        ("WarmupDecayLR", "linear", AUTO | {"total_num_steps": 20}),
    ],
)
def test_blocks_that_repeat_the_recipe_are_taken_and_left_out(
    tmp_path: Path, kind: str, schedule: Any, fields: dict[str, Any]
) -> None:
    """As transformers documents them, with "auto" or with numbers."""
    params = TrainingParams(
        learning_rate=1e-3, weight_decay=0.1, schedule=schedule, warmup_steps=3, max_steps=20, global_batch_size=16
    )
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}}
    own = {"optimizer": optimizer, "scheduler": {"type": kind, "params": fields}}
    assert not {"optimizer", "scheduler"} & complete(tmp_path, own, params).keys()
    other = params.model_copy(update={"schedule": "cosine"})
    with pytest.raises(RecipeError, match=rf"schedule: cosine\. Remove the block.*or write `schedule: {schedule}`"):
        complete(tmp_path, own, other)
    optimizer["params"]["betas"] = [0.8, 0.999]
    optimizer["params"]["betta"] = 1
    with pytest.raises(RecipeError, match=r"betas is \[0.8, 0.999\], and the recipe makes it \[0.9, 0.999\]") as caught:
        complete(tmp_path, own, params)
    assert "its optimizer.params.betta is no field that is read here" in str(caught.value)


def test_truth_is_no_number(tmp_path: Path) -> None:
    """JSON's 1 is not `true`: DeepSpeed would take either, so it is said."""
    with pytest.raises(RecipeError, match=r"bf16\.enabled is 1"):
        complete(tmp_path, {"bf16": {"enabled": 1}})


@pytest.mark.parametrize("stage", [4, "two", True, None])
def test_a_stage_that_is_none_is_refused(tmp_path: Path, stage: Any) -> None:
    with pytest.raises(RecipeError, match=r"zero_optimization.stage is"):
        complete(tmp_path, {"zero_optimization": {"stage": stage}})


def test_buckets_follow_the_width() -> None:
    """64 x 64; nine tenths of it; ten times 64. What the file says itself stays."""
    layout = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 7,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    }
    fitted = fit_to_width(layout, 64)
    assert fitted is not None
    assert fitted["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
    }
    assert layout["zero_optimization"]["stage3_prefetch_bucket_size"] == "auto"
