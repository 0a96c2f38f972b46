"""Batches, lengths, learning rates and layouts, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.layouts import layout_path, read_layout, zero_stage
from stages.lib.training.params import TrainingParams, derive_batch, learning_rate_factor, optimizer_steps


def params(**changes: Any) -> TrainingParams:
    return TrainingParams(**{"global_batch_size": 8, "max_steps": 10, "learning_rate": 1.0, **changes})


@pytest.mark.parametrize(
    ("resources", "micro", "accumulation"),
    [
        ({}, 8, 1),
        ({"processes": 2}, 4, 1),
        ({"micro_batch_size": 1}, 1, 8),
        ({"micro_batch_size": 2, "processes": 2}, 2, 2),
        ({"micro_batch_size": 1, "processes": 2, "nodes": 4}, 1, 1),
    ],
)
def test_accumulation_is_derived(resources: dict[str, Any], micro: int, accumulation: int) -> None:
    batch = derive_batch(8, Resources(**resources))
    assert (batch.micro_batch_size, batch.accumulation) == (micro, accumulation)
    assert batch.micro_batch_size * batch.accumulation * batch.processes == 8


def test_a_batch_that_does_not_divide_says_which_would() -> None:
    with pytest.raises(RecipeError) as caught:
        derive_batch(16, Resources(processes=2, micro_batch_size=3))
    assert str(caught.value) == (
        "params.global_batch_size: 16 is not a multiple of 6 (micro_batch_size 3 x 2 processes). Take 12 or 18, or change "
        "resources.micro_batch_size or resources.processes."
    )
    with pytest.raises(RecipeError, match="Take 2, or"):
        derive_batch(1, Resources(processes=2))


def test_exactly_one_length() -> None:
    with pytest.raises(ValueError, match="either max_steps or epochs"):
        params(epochs=1.0)
    with pytest.raises(ValueError, match="either max_steps or epochs"):
        TrainingParams(global_batch_size=8, learning_rate=1.0)


def test_the_warmup_ends_before_the_run() -> None:
    with pytest.raises(ValueError, match="warmup_steps 10 must be below max_steps 10"):
        params(warmup_steps=10)


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.0, 16, 2), (1.0, 17, 3), (2.5, 16, 5), (0.1, 16, 1)])
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, rows: int, steps: int) -> None:
    assert optimizer_steps(params(max_steps=None, epochs=epochs), rows) == steps


def test_cosine_by_hand() -> None:
    """Warmup 3 of 11: 1/4, 2/4, 3/4, then from 1 down. Half of the 8 remaining steps later 0.2 + 0.8 / 2."""
    given = params(max_steps=11, warmup_steps=3, min_learning_rate_fraction=0.2)
    factors = [learning_rate_factor(given, step, 11) for step in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[7] == pytest.approx(0.6)
    assert factors[5] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert factors[11] == pytest.approx(0.2)


def test_linear_and_constant_by_hand() -> None:
    linear = params(schedule="linear", max_steps=4)
    assert [learning_rate_factor(linear, step, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    constant = params(schedule="constant", warmup_steps=1)
    assert [learning_rate_factor(constant, step, 10) for step in range(4)] == [0.5, 1, 1, 1]


def test_layouts(tmp_path: Path) -> None:
    assert [zero_stage(Resources(deepspeed=name)) for name in ("zero1", "zero2", "zero3", "zero3_offload")] == [
        1,
        2,
        3,
        3,
    ]
    assert zero_stage(Resources()) == 0
    with pytest.raises(RecipeError, match="Did you mean 'zero2'"):
        layout_path("zero_2")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match="is not JSON"):
        read_layout(str(tmp_path / "broken.json"))


def test_check_reports_batch_and_layout_together() -> None:
    problems = check_training(Forecast(params(), Resources(processes=3, deepspeed="zero9"), {}))
    assert [problem.where for problem in problems] == ["params.global_batch_size", "resources.deepspeed"]


def test_estimate() -> None:
    """Llama with hidden 8, 1 layer: 2 x 16 x 8 embeddings, 4 x 64 attention, 3 x 8 x 16 mlp, 3 x 8 norms: 920 parameters."""
    block = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    forecast = Forecast(params(max_steps=None, epochs=2.0), Resources(processes=2, micro_batch_size=2), {})
    found = estimate_training(forecast, architecture=block, num_rows=20, sequence_length=4)
    assert found.parameters == 920
    assert found.optimizer_steps == 5
    assert (found.global_batch_size, found.micro_batch_size, found.accumulation) == (8, 2, 2)
    # 16 bytes a parameter; 8 tokens x (hidden 8 x 17 x 4 bytes + 16 x 12 bytes of logits).
    assert found.memory_bytes_per_rank == 920 * 16 + 8 * (8 * 17 * 4 + 16 * 12)


def test_what_is_not_known_is_not_guessed() -> None:
    forecast = Forecast(params(), Resources(), {})
    found = estimate_training(forecast, architecture={"model_type": "llama"}, num_rows=None, sequence_length=None)
    assert found == Estimate(
        architecture={"model_type": "llama"},
        optimizer_steps=10,
        global_batch_size=8,
        micro_batch_size=8,
        accumulation=1,
    )


def test_the_checkpoint_of_the_best_step_takes_room_too() -> None:
    """4 bytes a parameter are published; a checkpoint takes 18: two that are kept, the one being written, and the best."""
    best = params(publish_best={"metric": "heldout_loss"}, evaluate_every_steps=5)
    found = [
        estimate_training(
            Forecast(given, Resources(), {}), architecture=None, num_rows=None, sequence_length=None, parameters=10
        )
        for given in (params(), best)
    ]
    assert [each.disk_bytes for each in found] == [10 * (4 + 18 * 3), 10 * (4 + 18 * 4)]
