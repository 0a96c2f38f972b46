"""A param whose choices are the keys of a table."""

from __future__ import annotations

import pytest

from pipeline.settings.strict import validate
from stages import STAGES
from stages.lib.formulas.preference_losses import PREFERENCE_LOSSES

PARAMS = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 1, "max_length_tokens": 64}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_of_the_table_may_be_named(name: str) -> None:
    params, problems = validate(STAGES["dpo"].params, {**PARAMS, "loss": name}, "params")
    assert problems == []
    assert params is not None and params.model_dump()["loss"] == name


def test_a_misspelt_choice_is_answered_with_the_nearest() -> None:
    _, problems = validate(STAGES["dpo"].params, {**PARAMS, "loss": "sigmod"}, "params")
    assert [str(problem) for problem in problems] == [
        "params.loss: input should be 'sigmoid', 'hinge' or 'ipo', not 'sigmod'. Did you mean 'sigmoid'?"
    ]


def test_one_that_is_like_none_of_them_is_answered_with_what_the_param_means() -> None:
    _, (problem,) = validate(STAGES["dpo"].params, {**PARAMS, "loss": "kto"}, "params")
    assert problem.what == "input should be 'sigmoid', 'hinge' or 'ipo', not 'kto'"
    assert problem.hint == "What is minimized."
