"""The loss of a step with each policy loss and each way to add up tokens: by hand, and however the step is spread."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.stage import World
from stages.lib.on_policy.experience import Experience
from tests.numerics.test_on_policy_loss import LN2, NUM_TOKENS, grpo, loss_of, ppo, two_episodes

VARIANTS: dict[str, dict[str, Any]] = {
    "seq_mean_token_mean": {"loss_aggregation": "seq_mean_token_mean"},
    "seq_mean_token_sum": {"loss_aggregation": "seq_mean_token_sum"},
    "dr_grpo": {"loss_aggregation": "seq_mean_token_sum_norm"},
    "dapo": {"clip_ratio": 0.2, "clip_ratio_high": 0.28},
    "gspo": {"policy_loss": "gspo", "clip_ratio": 3e-4, "clip_ratio_high": 4e-4},
    "gspo_token": {"policy_loss": "gspo_token", "clip_ratio": 3e-4},
    "cispo": {"policy_loss": "cispo", "clip_ratio": 0.2, "clip_ratio_high": 0.5},
    "sapo": {"policy_loss": "sapo", "clip_ratio": 0.2},
    "dual_clip": {"dual_clip": 1.5},
    "without the truncated": {"mask_truncated_completions": True},
}
MORE = {"entropy_coefficient": 0.01}


def one_truncated() -> Experience:
    """The second completion was cut off."""
    first, second = two_episodes().episodes
    return Experience([first, replace(second, ended=False)])


@pytest.mark.parametrize(
    ("aggregation", "policy", "divergence"),
    [
        ("token_mean", 3.6 / 4, (3.5 - 2 * LN2) / 4),
        ("seq_mean_token_mean", (-2.4 / 3 + 6) / 2, (0.5 / 3 + 3 - 2 * LN2) / 2),
        ("seq_mean_token_sum", 3.6 / 2, (3.5 - 2 * LN2) / 2),
        ("seq_mean_token_sum_norm", 3.6 / 8, (3.5 - 2 * LN2) / 8),
    ],
)
def test_the_loss_of_grpo_added_up_otherwise(
    aggregation: str, policy: float, divergence: float, tmp_path: Path
) -> None:
    """The tokens lose -1.2, -2 and 0.8 in the first completion and 6 in the second (`test_the_loss_of_ppo`), and k3 is 0,
    1 - log 2, log 2 - 1/2, and 3 - 2 log 2. A completion has at most 4 tokens.

    The entropy, 29/4 log 2 in all, is a mean over tokens whatever the others are.
    """
    loss, logged = loss_of(grpo(tmp_path, more={"loss_aggregation": aggregation, **MORE}))
    assert logged["policy_loss"] == pytest.approx(policy, abs=1e-6)
    assert logged["kl_loss"] == pytest.approx(divergence, abs=1e-6)
    assert loss == pytest.approx(policy + 0.5 * divergence - 0.01 * 7.25 * LN2 / 4, abs=1e-6)


def test_the_loss_of_gspo(tmp_path: Path) -> None:
    """The log ratios are 1, 0 and -1 units, a mean of 0: s = 1; and 1: s = 2. Clipped at 1/2 and 3/2.

    The first completion loses -A s = -1, -2 and 1, a mean of -2/3; the second max(6, 9/2) = 6. Their mean is 8/3.
    """
    more = {"policy_loss": "gspo", "clip_ratio": 0.5, "kl_coefficient": 0.0}
    loss, logged = loss_of(grpo(tmp_path, more=more))
    assert loss == pytest.approx(8 / 3, abs=1e-6)
    assert logged["clipped"] == 0


def test_the_loss_of_cispo(tmp_path: Path) -> None:
    """Ratios of 2, 1, 1/2 and 2 are weights of 3/2, 1, 1/2 and 3/2; log pi = -1, -1, -2 and -2 units; A = 1, 2, -1 and -3.

    -w A log pi = 3/2, 2, -1 and -9: -13/2 units over 4 tokens. Two of them are beyond the bound.
    """
    more = {"policy_loss": "cispo", "clip_ratio_high": 0.5, "clip_ratio": 0.2, "kl_coefficient": 0.0}
    loss, logged = loss_of(grpo(tmp_path, more=more))
    assert loss == pytest.approx(-6.5 * LN2 / 4, abs=1e-6)
    assert logged["clipped"] == 2 / 4


def test_the_loss_with_a_bound_of_negative_advantages(tmp_path: Path) -> None:
    """The last token, of ratio 2 and A = -3, counts 3/2 x 3 = 4.5 instead of 6, and is clipped as well."""
    loss, logged = loss_of(grpo(tmp_path, more={"dual_clip": 1.5, "kl_coefficient": 0.0}))
    assert loss == pytest.approx((3.6 - 1.5) / 4, abs=1e-6)
    assert logged["clipped"] == 3 / 4


def test_a_truncated_completion_is_left_out(tmp_path: Path) -> None:
    """What is left loses -2.4 over 3 tokens; over completions, of which there still are two, -2.4 / 3 / 2."""
    for aggregation, expected in (("token_mean", -2.4 / 3), ("seq_mean_token_mean", -2.4 / 3 / 2)):
        more = {"mask_truncated_completions": True, "loss_aggregation": aggregation, "kl_coefficient": 0.0}
        learner = grpo(tmp_path, more=more)
        stats = learner.optimize(one_truncated(), [0, 1], 0)
        assert stats["loss"] == pytest.approx(expected, abs=1e-6)
        assert stats["tokens"] == 3
        assert stats["ratio"] == pytest.approx((2 + 1 + 0.5) / 3, abs=1e-6)


@pytest.mark.parametrize("old", [-200.0, -2.0])
def test_a_step_of_nothing_but_truncated_completions_is_finite(old: float, tmp_path: Path) -> None:
    """All is 0, also where exp(200), the ratio of a token that is left out, would be infinite."""
    episodes = [replace(each, ended=False, logprobs=each.logprobs * 0 + old) for each in two_episodes().episodes]
    stats = grpo(tmp_path, more={"mask_truncated_completions": True}).optimize(Experience(episodes), [0, 1], 0)
    assert (stats["loss"], stats["gradient_norm"], stats["tokens"], stats["ratio"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("make", [ppo, grpo])
@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_do_not_change_a_step(name: str, make: Any, tmp_path: Path) -> None:
    """One sequence at a time, or both at once: the same logged numbers, the same gradient, the same weights after it."""
    once = make(tmp_path, more={**MORE, **VARIANTS[name]})
    twice = make(tmp_path, more={**MORE, **VARIANTS[name]}, micro_batch_size=1)
    stats, again = once.optimize(one_truncated(), [0, 1], 0), twice.optimize(one_truncated(), [1, 0], 0)
    for each in (stats, again):
        assert each.pop("seconds") >= 0
    assert again == pytest.approx(stats, abs=1e-6)
    assert stats["gradient_norm"] > 0
    for one, two in zip(once.parts.module.parameters(), twice.parts.module.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [ppo, grpo])
@pytest.mark.parametrize("name", VARIANTS)
def test_processes_do_not_change_the_loss(name: str, make: Any, tmp_path: Path) -> None:
    """Gradients are averaged over two processes, so each gives twice its part of the sum: their mean is the whole loss."""
    more = {**MORE, **VARIANTS[name]}
    learner = make(tmp_path, more=more)
    tokens = float(sum(map(learner.learned_tokens, one_truncated().episodes)))
    assert tokens == (3 if "truncated" in name else NUM_TOKENS)
    whole = float(learner.loss(learner.collate(one_truncated().episodes), tokens, {}).detach())
    parts = []
    for rank, each in enumerate(one_truncated().episodes):
        part = make(tmp_path, more=more, engine=learner.parts.engine, world=World(rank=rank, size=2))
        parts.append(float(part.loss(part.collate([each]), tokens, {}).detach()))
    assert math.fsum(parts) / 2 == pytest.approx(whole, abs=1e-6)
