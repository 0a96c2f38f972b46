"""The advantages of REINFORCE++ and of its baseline form, by hand and against a slow loop; and what a recipe may say of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.alignment.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusParams
from stages.lib.on_policy.experience import Experience
from tests.numerics.test_on_policy_loss import (
    COMMON,
    LN2,
    advantages,
    episode,
    float32,
    loss_of,
    make_learner,
    near,
    of_four,
    of_two_tokens_and_one,
)
from tests.unit.test_policy_loss_params import accepted, read


def plain(**more: Any) -> ReinforcePlusPlus:
    return ReinforcePlusPlus(ReinforcePlusPlusParams(**COMMON, **more))


def with_baseline(**more: Any) -> ReinforcePlusPlus:
    return plain(subtract_group_mean=True, completions_per_prompt=2, kl_estimator="k2", **more)


def test_the_advantages_by_hand() -> None:
    """Scores 2 and -1, beta 1/2, log pi - log ref (1, -1) and (2): rewards (-1/2, 1/2 + 2) and (-1 - 1).

    What follows each token is (2, 5/2) and (-2), of mean 5/6 and variance (49 + 100 + 289) / 36 / 3 = 73/18. The critic's
    values, which there are in these episodes, have no part in it.
    """
    found, returns, _ = advantages(plain(), of_two_tokens_and_one(), [2, -1], 0.5)
    root = math.sqrt(73 / 18)
    assert found == near([[7 / 6 / root, 10 / 6 / root], [-17 / 6 / root, 0]])
    assert returns == [[0, 0], [0, 0]]


def test_the_advantages_discounted_by_hand() -> None:
    """gamma 1/2: -1/2 + 5/4 = 3/4, 5/2 and -2, of mean 5/12 and variance (16 + 625 + 841) / 144 / 3 = 247/72."""
    found, _, _ = advantages(plain(gamma=0.5), of_two_tokens_and_one(), [2, -1], 0.5)
    root = math.sqrt(247 / 72)
    assert found == near([[4 / 12 / root, 25 / 12 / root], [-29 / 12 / root, 0]])


def test_equal_scores_leave_the_penalty_alone() -> None:
    """Penalties (-1/2, 1/2) and -1: what follows is (0, 1/2) and -1, as large as it is. Without a penalty, nothing."""
    found, _, _ = advantages(plain(), of_two_tokens_and_one(), [7, 7], 0.5)
    assert found == near([[0, 0.5], [-1, 0]])
    found, _, _ = advantages(plain(), of_two_tokens_and_one(), [7, 7], 0.0)
    assert found == [[0, 0], [0, 0]]


def test_the_advantages_of_the_baseline_form_by_hand() -> None:
    """Scores (1, 3) and (5, 7) less their means are -1, 1, -1, 1, over 1, 3, 2 and 2 tokens: their mean is 2/8, their
    variance 1 - 1/16. (-1 - 1/4) / sqrt(15/16) = -5 / sqrt 15, and 3 / sqrt 15. The divergence has no part in it.
    """
    found, _, _ = advantages(with_baseline(), of_four(), [1, 3, 5, 7], 0.5)
    low, high = -5 / math.sqrt(15), 3 / math.sqrt(15)
    assert found == near([[low, 0, 0], [high] * 3, [low, low, 0], [high, high, 0]])
    nothing, _, _ = advantages(with_baseline(), of_four(), [3, 3, 5, 5], 0.5)
    assert nothing == [[0, 0, 0]] * 4


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_advantages_against_a_slow_loop(gamma: float) -> None:
    """Token by token, as the paper writes it."""
    draw = np.random.default_rng(0)
    lengths, scores, beta = [4, 1, 6, 3], [0.5, -1.0, 2.0, 0.0], 0.3
    episodes = [
        episode(n, [1], [1] * k, logprobs=float32(*draw.normal(size=k)), ref_logprobs=float32(*draw.normal(size=k)))
        for n, k in enumerate(lengths)
    ]
    expected = []
    for each, score in zip(episodes, scores, strict=True):
        rewards = [-beta * (float(p) - float(r)) for p, r in zip(each.logprobs, each.ref_logprobs, strict=True)]
        rewards[-1] += score
        expected.append(
            [sum(gamma ** (i - t) * rewards[i] for i in range(t, len(rewards))) for t in range(len(rewards))]
        )
    flat = np.concatenate(expected)
    found, _, _ = advantages(plain(gamma=gamma), Experience(episodes), scores, beta)
    for row, values in zip(found, expected, strict=True):
        assert row[: len(values)] == pytest.approx([(v - flat.mean()) / flat.std() for v in values], abs=1e-6)
    flattened = torch.tensor([value for row, k in zip(found, lengths, strict=True) for value in row[:k]])
    assert [float(flattened.mean()), float(flattened.std(correction=0))] == pytest.approx([0, 1], abs=1e-6)


def test_where_the_divergence_is(tmp_path: Path) -> None:
    """Of the plain form in the reward alone; of the baseline form in the loss, where k2 of 0, 1, -1 and 2 units is half of
    the squares: 3 (log 2)^2 in all, beside the 3.6 of `test_the_loss_of_ppo`."""
    for algorithm, divergence in ((plain(kl_coefficient=0.5), 0.0), (with_baseline(kl_coefficient=0.5), 3 * LN2**2)):
        loss, logged = loss_of(make_learner(tmp_path, algorithm, algorithm.params))
        assert loss == pytest.approx((3.6 + 0.5 * divergence) / 4, abs=1e-6)
        assert ("kl_loss" in logged) == bool(divergence)


BASELINE = {"subtract_group_mean": True, "completions_per_prompt": 4, "kl_estimator": "k2"}


@pytest.mark.parametrize(
    ("given", "problem", "way_out"),
    [
        (
            {"subtract_group_mean": True, "kl_estimator": "k2"},
            (
                "params: subtract_group_mean compares the completions of a prompt, and completions_per_prompt is 1: take 4, or"
                " remove subtract_group_mean."
            ),
            BASELINE,
        ),
        (
            {"dynamic_sampling": {}},
            (
                "params: dynamic_sampling compares the completions of a prompt, and completions_per_prompt is 1: take 4, or"
                " remove dynamic_sampling."
            ),
            {"dynamic_sampling": {}, "completions_per_prompt": 4},
        ),
        (
            {**BASELINE, "gamma": 0.9},
            "params: gamma has no effect with subtract_group_mean: remove it, or leave the mean where it is.",
            {"gamma": 0.9},
        ),
        (
            {**BASELINE, "kl_estimator": "k1"},
            (
                "params: kl_estimator k1 has a gradient of 0 on average as a term of the loss, which it is with"
                " subtract_group_mean: take k2, as its authors do, or k3."
            ),
            {**BASELINE, "kl_estimator": "k3"},
        ),
    ],
)
def test_what_cannot_be_is_refused(given: Mapping[str, Any], problem: str, way_out: Mapping[str, Any]) -> None:
    params, problems = read("reinforce_plus_plus", **given)
    assert params is None
    assert problems == [problem]
    accepted("reinforce_plus_plus", **way_out)


def test_without_a_penalty_any_estimator_will_do() -> None:
    accepted("reinforce_plus_plus", **{**BASELINE, "kl_estimator": "k1", "kl_coefficient": 0.0})
