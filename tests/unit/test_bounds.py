"""Numbers of recipes lie where the arithmetic bears them: what is too small or too large is refused with a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.command.reports import stage_lines
from pipeline.settings.strict import Reading, validate
from stages import STAGES

ON_POLICY: dict[str, Any] = {
    "rewards": [{"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1}],
    "rollouts": 3, "rollout_batch_size": 8, "global_batch_size": 8, "max_prompt_tokens": 24, "max_new_tokens": 8, "learning_rate": 1e-3,
    "kl_target": 6.0,
}  # fmt: skip
PREFERENCES: dict[str, Any] = {"learning_rate": 1e-3, "global_batch_size": 8, "max_steps": 3, "max_length_tokens": 64}
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "global_batch_size": 8, "max_steps": 3}

DIVISORS = {
    "ppo": (ON_POLICY, ["temperature", "reward_clip", "clip_ratio_high", "max_policy_kl", "max_logprob_mismatch", "mismatch_cap", "value_coefficient", "value_clip", "value_learning_rate", "kl_target", "kl_horizon"]),
    "dpo": (PREFERENCES, ["beta"]),
    "kto": (PREFERENCES, ["beta"]),
    "distill": (TRAINING, ["temperature"]),
}  # fmt: skip
PARTS = {
    "ppo": (ON_POLICY, ["kl_coefficient", "missing_end_penalty", "entropy_coefficient"]),
    "reward": (PREFERENCES, ["margin", "label_smoothing", "center_rewards_coefficient"]),
    "dpo": (PREFERENCES, ["label_smoothing"]),
    "kto": (PREFERENCES, ["desirable_weight", "undesirable_weight"]),
    "quantize": ({}, ["max_perplexity_increase"]),
}
"""What may be 0, which leaves it out."""


def wrong_with(kind: str, params: dict[str, Any]) -> list[str]:
    found, problems = validate(STAGES[kind].params, params, "stages.x.params", Reading([]))
    assert (found is None) == bool(problems)
    return [str(problem) for problem in problems]


def cases(table: dict[str, tuple[dict[str, Any], list[str]]]) -> list[tuple[str, dict[str, Any], str]]:
    return [(kind, base, name) for kind, (base, names) in table.items() for name in names]


@pytest.mark.parametrize(("kind", "base", "name"), cases(DIVISORS) + cases(PARTS))
@pytest.mark.parametrize("value", [5e-324, 1e-320, 1e-300, 1e300, -1.0])
def test_what_the_arithmetic_does_not_bear_is_refused(kind: str, base: dict[str, Any], name: str, value: float) -> None:
    base = {key: each for key, each in base.items() if key != "kl_target" or name.startswith(("kl_horizon", "kl_coef"))}
    (problem,) = wrong_with(kind, {**base, name: value})
    assert problem.startswith(f"stages.x.params.{name}: ") and repr(value) in problem


@pytest.mark.parametrize(("kind", "base", "name"), cases(DIVISORS))
def test_a_divisor_is_not_zero(kind: str, base: dict[str, Any], name: str) -> None:
    assert wrong_with(kind, {**base, name: 0.0})


@pytest.mark.parametrize(("kind", "base", "name"), cases(PARTS))
def test_a_part_may_be_left_out(kind: str, base: dict[str, Any], name: str) -> None:
    without_target = {key: each for key, each in base.items() if key != "kl_target"}
    assert wrong_with(kind, {**without_target, name: 0.0}) == []


@pytest.mark.parametrize("block", ["generation", "scored_replies"])
def test_sampling(block: str) -> None:
    for fine in ({"temperature": 0.0}, {"temperature": 0.001}, {"temperature": 100.0}, {"top_p": 0.001}):
        assert wrong_with("evaluate", {block: fine}) == []
    for bad in (
        {"temperature": 1e-4},
        {"temperature": 1e-320},
        {"temperature": 101.0},
        {"top_p": 1e-320},
        {"top_p": 0.0},
    ):
        assert len(wrong_with("evaluate", {block: bad})) == 1


@pytest.mark.parametrize("weight", [0.0, 1e-320, -1e-9, 1e300])
def test_rewards_have_weights_that_count(weight: float) -> None:
    (reward,) = ON_POLICY["rewards"]
    assert len(wrong_with("ppo", {**ON_POLICY, "rewards": [{**reward, "weight": weight}]})) == 1
    assert wrong_with("ppo", {**ON_POLICY, "rewards": [{**reward, "weight": -2.5}]}) == []


@pytest.mark.parametrize("weight", [0.0, 1e-320, 1e300])
def test_sources_have_weights_that_count(weight: float) -> None:
    assert len(wrong_with("mix", {"weights": {"a": 1.0, "b": weight}})) == 1
    assert wrong_with("mix", {"weights": {"a": 1.0, "b": 0.001}}) == []


@pytest.mark.parametrize(("horizon", "size", "refused"), [(1.0, 8, True), (1.6, 8, True), (1.7, 8, False), (102.4, 512, True), (512.0, 512, False)])  # fmt: skip
def test_a_horizon_in_which_the_coefficient_would_be_lost(horizon: float, size: int, refused: bool) -> None:
    """8 / 5 = 1.6 and 512 / 5 = 102.4."""
    problems = wrong_with("ppo", {**ON_POLICY, "rollout_batch_size": size, "kl_horizon": horizon})
    assert bool(problems) == refused
    assert all(f"above rollout_batch_size / 5, which is {size / 5:g}" in problem and f"Take {size} or more" in problem for problem in problems)  # fmt: skip


def test_what_a_stage_prints_of_itself_says_the_bounds() -> None:
    lines = [line.strip() for line in stage_lines(STAGES["ppo"])]
    assert "temperature: float (from 0.001 to 100), default 1.0" in lines
    assert "kl_coefficient: float (0 or from 1e-08 to 1e+06), default 0.05" in lines
    assert "clip_ratio: float (from 1e-06 below 1), default 0.2" in lines
    assert "reward_clip: float (from 1e-06 to 1e+06) | None, default none" in lines
