"""What is made of held-out scores: calibration and distribution by hand, and that every row is measured in its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.formulas.calibration import expected_calibration_error, preference_calibration_error
from stages.lib.preferring.reward_models import score_distribution
from stages.lib.training import evaluating
from stages.lib.training.evaluating import Evaluator

LOG3, LOG19 = math.log(3), math.log(19)
"""Log-odds of the probabilities 0.75 and 0.95."""


def test_expected_calibration_error() -> None:
    """Four bins. (0, 1/4] holds 1/4, which was wrong: 1/4. (1/2, 3/4] holds 0.6, 0.7 and 3/4, of which two were right:
    |2 - 2.05| = 0.05. (3/4, 1] holds 1, which was right: 0. The sum, 0.3, over 5 is 0.06.
    """
    confidence = torch.tensor([0.25, 0.6, 0.7, 0.75, 1.0], dtype=torch.float64)
    correct = torch.tensor([0, 1, 0, 1, 1])
    assert expected_calibration_error(confidence, correct, num_bins=4) == pytest.approx(0.06, rel=1e-12)


def test_bins_begin_at_the_lowest_confidence() -> None:
    """Two bins between 1/2 and 1: 0.6 is wrong by 0.4 and 0.9 by 0.9, apart. Between 0 and 1 both are in one bin, where
    right and wrong make up for each other: |1 - 1.5| = 0.5.
    """
    confidence, correct = torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([1, 0])
    apart = expected_calibration_error(confidence, correct, lowest=0.5, num_bins=2)
    assert apart == pytest.approx((0.4 + 0.9) / 2, rel=1e-12)
    together = expected_calibration_error(confidence, correct, num_bins=2)
    assert together == pytest.approx(0.5 / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # Sure to 0.75, and right in three of four cases: calibrated.
        ([LOG3, LOG3, LOG3, -LOG3], 0.0),
        # Always wrong.
        ([-LOG3, -LOG3], 0.75),
        # Two at 0.75, both right, are 2 x 0.25 away; of two at 0.95 one is right: |1 - 1.9| = 0.9. (0.5 + 0.9) / 4.
        ([LOG3, LOG3, LOG19, -LOG19], 0.35),
        # No difference, no preference: sure to 1/2, and half right.
        ([0.0, 0.0], 0.0),
    ],
)
def test_preference_calibration_error(differences: list[float], expected: float) -> None:
    """sigmoid(log 3) = 3/4 and sigmoid(log 19) = 19/20; a negative difference is the wrong answer, as surely preferred."""
    rejected = torch.linspace(-1, 1, len(differences), dtype=torch.float64)
    chosen = rejected + torch.tensor(differences, dtype=torch.float64)
    assert preference_calibration_error(chosen, rejected) == pytest.approx(expected, abs=1e-12)


def test_score_distribution() -> None:
    """The scores -4, 0, 1 and 3: mean 0, mean square (16 + 0 + 1 + 9) / 4 = 6.5. Percentile p lies at 3 p / 100:
    5 at 0.15, 4 x 0.15 above -4; 25 at 0.75; 50 between 0 and 1; 75 a quarter of the way from 1 to 3; 95 at 2.85.
    """
    found = score_distribution(torch.tensor([3.0, 1.0]), torch.tensor([0.0, -4.0]))
    assert found == pytest.approx(
        {
            "heldout_score_mean_chosen": 2.0,
            "heldout_score_mean_rejected": -2.0,
            "heldout_score_deviation": math.sqrt(6.5),
            "heldout_score_percentile_5": -3.4,
            "heldout_score_percentile_25": -1.0,
            "heldout_score_percentile_50": 0.5,
            "heldout_score_percentile_75": 1.5,
            "heldout_score_percentile_95": 2.7,
        },
        rel=1e-12,
    )


# The value of every row.

ROWS = [{"value": float(value)} for value in (5, 3, 8, 1, 9, 2, 7)]


def evaluator_in(folder: Path, world: World) -> Evaluator:
    ctx = Context(
        inputs={},
        out=folder,
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder),
        seed=0,
        resources=Resources(),
        journal=Journal(folder / "journal.jsonl", writes=False),
        world=world,
        stop_requested=lambda: False,
    )
    return Evaluator(torch.nn.Linear(1, 1), ctx, torch.device("cpu"), 2)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in ("value", "position")}


def squares(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert not model.training and not torch.is_grad_enabled()
    return {"square": batch["value"].square(), "position": batch["position"]}


EXPECTED = {"square": [25.0, 9.0, 64.0, 1.0, 81.0, 4.0, 49.0], "position": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


@pytest.mark.parametrize("size", [2, 3, 10])
def test_values_stand_in_the_order_of_rows(size: int, tmp_path: Path) -> None:
    evaluator = evaluator_in(tmp_path, World())
    found = evaluator.values(ROWS, collate, squares, size)
    assert {name: vector.tolist() for name, vector in found.items()} == EXPECTED
    assert {vector.dtype for vector in found.values()} == {torch.float64}
    assert evaluator.model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_values_of_several_processes(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches: of five processes one has none, and of three two have none in the second round. They repeat the first.

    The processes run one after the other here. What one of them has alone is not all there is, which is seen.
    """
    shares: list[Any] = []

    def what_there_is_so_far(mine: Any) -> list[Any]:
        shares.append(mine)
        return shares

    monkeypatch.setattr(evaluating, "from_all", what_there_is_so_far)
    for rank in reversed(range(1, processes)):
        with pytest.raises((AssertionError, IndexError)):
            evaluator_in(tmp_path, World(rank, processes, rank)).values(ROWS, collate, squares)
    found = evaluator_in(tmp_path, World(0, processes, 0)).values(ROWS, collate, squares)
    assert {name: vector.tolist() for name, vector in found.items()} == EXPECTED


def test_a_measure_that_sums_is_no_value_of_rows(tmp_path: Path) -> None:
    def total(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sum": batch["value"].sum()}

    with pytest.raises(AssertionError, match="one value a row"):
        evaluator_in(tmp_path, World()).values(ROWS, collate, total)


def test_nothing_to_measure_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are none to measure on"):
        evaluator_in(tmp_path, World()).values([], collate, squares)
