"""What a recipe of online DPO may say, and what it is told where it says more."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.settings.resources import Resources
from pipeline.stage import Forecast
from stages import STAGES
from stages.alignment.online_dpo import OnlineDPOParams
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES
from stages.lib.on_policy.pair_params import UNUSED, PairLossName, fits_pairs_of_rollouts
from tests.unit.test_on_policy_params import MODEL, PARAMS

WRONG: dict[str, Any] = {
    "beta": 0.2,
    "missing_eos_penalty": 1.0,
    "policy_loss": "gspo",
    "loss_aggregation": "token_mean",
    "clip_ratio": 0.1,
    "clip_ratio_high": 0.3,
    "dual_clip": 3.0,
    "loss_options": {"discopop_temperature": 0.1},
    "entropy_coefficient": 0.01,
    "mismatch_cap": 2.0,
    "background_rollouts": True,
    "mask_truncated_completions": True,
    "normalize_rewards": True,
    "reward_clip": 1.0,
}


def said(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        OnlineDPOParams(**{**PARAMS, **changes})
    return str(caught.value)


def test_what_would_have_no_effect_is_refused_by_name() -> None:
    """All at once, each with its reason; and what a manifest says of these, which are their defaults, is read again."""
    assert WRONG.keys() == UNUSED.keys()
    everything = said(**WRONG)
    assert all(f"{name} {why}: remove it" in everything for name, why in UNUSED.items())
    assert all(f"{name} {UNUSED[name]}: remove it" in said(**{name: value}) for name, value in WRONG.items())
    params = OnlineDPOParams(**PARAMS)
    assert OnlineDPOParams(**params.model_dump()) == params


def test_the_losses_are_those_that_need_no_more_than_pairs_and_the_reference() -> None:
    assert set(get_args(PairLossName)) == {
        name for name, row in PREFERENCE_LOSSES.items() if fits_pairs_of_rollouts(row)
    }
    for name in get_args(PairLossName):
        row = PREFERENCE_LOSSES[name]
        if row.takes_label_smoothing:
            params = OnlineDPOParams(**PARAMS, loss=name, label_smoothing=0.1, kl_coefficient=0.3)
            assert params.pair_loss_options == {"beta": 0.3, "label_smoothing": 0.1}
        else:
            assert "label_smoothing has no effect" in said(loss=name, label_smoothing=0.1)
            assert OnlineDPOParams(**PARAMS, loss=name).pair_loss_options == {"beta": 0.1}
    assert "the loss robust needs label_smoothing" in said(loss="robust")
    assert "greater than" in said(kl_coefficient=0)


def test_a_step_is_so_many_pairs() -> None:
    """16 completions are 8 pairs, or 4 where each prompt has 4 completions: one step of 8 pairs, two of 2."""
    assert OnlineDPOParams(**PARAMS).total_steps == 3
    assert OnlineDPOParams(**{**PARAMS, "completions_per_prompt": 4, "global_batch_size": 2}).total_steps == 6
    assert "16 gives 4 pairs, which is not a multiple of global_batch_size 8" in said(completions_per_prompt=4)


def test_a_pair_takes_the_room_of_two_completions() -> None:
    """What activations take beside the weights doubles with micro batches, and so does it from grpo to pairs."""

    def memory(kind: str, micro_batch_size: int) -> int:
        stage = STAGES[kind]
        model = dataclasses.replace(MODEL)
        resources = Resources(micro_batch_size=micro_batch_size)
        found = stage.estimate(Forecast(stage.params(**PARAMS), resources, {"model": model}))
        assert found.memory_bytes_per_rank is not None and found.sequence_length == 32
        return found.memory_bytes_per_rank

    assert memory("online_dpo", 1) == memory("grpo", 2) != memory("grpo", 1)
