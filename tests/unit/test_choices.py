"""A param whose choices are the keys of a table."""

from __future__ import annotations

import pytest

from pipeline.settings.strict import validate
from stages import STAGES
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES

PARAMS = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 1, "max_length_tokens": 64}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_of_the_table_may_be_named(name: str) -> None:
    """With the label smoothing that some need."""
    more = {"label_smoothing": 0.1} if PREFERENCE_LOSSES[name].needs_label_smoothing else {}
    params, problems = validate(STAGES["dpo"].params, {**PARAMS, **more, "loss": name}, "params")
    assert problems == []
    assert params is not None and params.model_dump()["loss"] == name


def test_a_misspelt_choice_is_answered_with_the_nearest() -> None:
    _, problems = validate(STAGES["dpo"].params, {**PARAMS, "f_divergence": "js_divergenc"}, "params")
    (problem,) = map(str, problems)
    assert problem.startswith("params.f_divergence: input should be 'reverse_kl', 'forward_kl', 'js_divergence' or")
    assert problem.endswith("not 'js_divergenc'. Did you mean 'js_divergence'?")


def test_one_that_is_like_none_of_them_is_answered_with_what_the_param_means() -> None:
    _, (problem,) = validate(STAGES["dpo"].params, {**PARAMS, "schedule": "stepwise"}, "params")
    assert problem.what == "input should be 'cosine', 'linear' or 'constant', not 'stepwise'"
    assert problem.hint.startswith("How the learning rate falls after the warmup")
