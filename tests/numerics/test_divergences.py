"""What a log-ratio is worth under each divergence, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.lib.formulas.divergences import DIVERGENCES, alpha_reward, forward_kl_reward, js_reward, reverse_kl_reward

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (reverse_kl_reward, [0.0, LN2, -LN2]),
        (forward_kl_reward, [0.0, 0.5, -1.0]),
        (js_reward, [0.0, math.log(4 / 3), math.log(2 / 3)]),
        (lambda ratio_N: alpha_reward(ratio_N, 0.5), [0.0, 2 - math.sqrt(2), 2 - 2 * math.sqrt(2)]),
        (lambda ratio_N: alpha_reward(ratio_N, 2.0), [0.0, 1.0, -0.5]),
    ],
    ids=["reverse", "forward", "js", "alpha 0.5", "alpha 2"],
)
def test_rewards(reward: object, expected: list[float]) -> None:
    """For t = 1, 2 and 1/2. log t; 1 - 1/t: 0, 1/2, -1; log(2 t / (1 + t)): 0, log(4/3), log(2/3).

    (t^(a - 1) - 1) / (a - 1): at a = 1/2 it is 2 (1 - 1 / sqrt(t)): 0, 2 - sqrt(2), 2 - 2 sqrt(2); at a = 2 it is t - 1.
    """
    ratio_N = torch.tensor([0.0, LN2, -LN2], dtype=torch.float64)
    assert reward(ratio_N).tolist() == pytest.approx(expected, abs=1e-12)  # type: ignore[operator]


def test_alpha_1_and_0_are_the_two_kl() -> None:
    ratio_N = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.equal(alpha_reward(ratio_N, 1.0), reverse_kl_reward(ratio_N))
    assert torch.equal(alpha_reward(ratio_N, 0.0), forward_kl_reward(ratio_N))
    near = alpha_reward(ratio_N, 1 + 1e-5)
    assert near.tolist() == pytest.approx(ratio_N.tolist(), rel=1e-4), "no jump where it is taken for 1"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_grows_with_the_ratio_and_is_finite(name: str) -> None:
    """All are monotone, so that who wins is the same under each; exp(300) would be no number in single precision."""
    divergence = DIVERGENCES[name]
    options = [0.5] if divergence.takes_alpha else []
    rewards = divergence.reward(torch.tensor([-300.0, -5.0, -1.0, 0.0, 1.0, 5.0]), *options)
    assert torch.isfinite(rewards).all()
    assert (rewards.diff() > 0).all()
