"""Losses that look at either answer by itself or sort many, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.lib.formulas.answer_losses import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from tests.numerics.test_preference_losses import LN2, log_probabilities, vectors

LN3 = math.log(3)


def rewards_of_log_3() -> list[torch.Tensor]:
    """Two pairs with the rewards (0, 0) and (log 3, -log 3) at beta 1: sigmoids 1/2, 1/2 and 3/4, 1/4."""
    return vectors([0.0, LN3], [0.0, -LN3], [0.0, 0.0], [0.0, 0.0])


def test_nca_pair_loss() -> None:
    """L(c) + (L(-c) + L(-r)) / 2 with L(x) = -log sigmoid(x). Rewards of 0: 2 log 2.

    Rewards of log 3 and -log 3: log(4/3) + (log 4 + log(4/3)) / 2 = 3/2 log(4/3) + log 2.
    """
    expected = [2 * LN2, 1.5 * math.log(4 / 3) + LN2]
    assert nca_pair_loss(*rewards_of_log_3(), beta=1.0).tolist() == pytest.approx(expected, rel=1e-12)


def test_bco_pair_loss() -> None:
    """L(c - d) + L(d - r). With d = 0: 2 log 2 and 2 log(4/3).

    With d = log 3: L(-log 3) + L(log 3) = log 4 + log(4/3) = log(16/3), and L(0) + L(log 9) = log 2 + log(10/9) = log(20/9).
    Of a mean reward of 2 log 3 half is that much.
    """
    assert bco_pair_loss(*rewards_of_log_3(), beta=1.0).tolist() == pytest.approx([2 * LN2, 2 * math.log(4 / 3)])
    expected = [math.log(16 / 3), math.log(20 / 9)]
    for how in ({"mean_reward": LN3}, {"mean_reward": 2 * LN3, "reward_shift": 0.5}):
        assert bco_pair_loss(*rewards_of_log_3(), beta=1.0, **how).tolist() == pytest.approx(expected, rel=1e-12)


def test_apo_zero_loss() -> None:
    """1 - sigmoid(c) + sigmoid(r): 1 - 1/2 + 1/2 = 1, and 1 - 3/4 + 1/4 = 1/2."""
    assert apo_zero_loss(*rewards_of_log_3(), beta=1.0).tolist() == pytest.approx([1.0, 0.5], rel=1e-12)


def test_apo_down_loss() -> None:
    """sigmoid(c) + 1 - sigmoid(c - r): 1/2 + 1 - 1/2 = 1, and, as sigmoid(log 9) = 9/10, 3/4 + 1 - 9/10 = 0.85."""
    assert apo_down_loss(*rewards_of_log_3(), beta=1.0).tolist() == pytest.approx([1.0, 0.85], rel=1e-12)


def test_apo_goes_where_it_says() -> None:
    """Where sigmoid' is 3/16 at +- log 3 and 9/100 at log 9: the chosen answer rises by zero, and falls by down.

    zero: -3/16 and 3/16. down: 3/16 - 9/100 and 9/100, so that both fall.
    """
    for function, expected in ((apo_zero_loss, (-3 / 16, 3 / 16)), (apo_down_loss, (3 / 16 - 0.09, 0.09))):
        chosen, rejected, *reference = (each[1:] for each in rewards_of_log_3())
        policy = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        function(*policy, *reference, beta=1.0).sum().backward()
        found = [each.grad.item() for each in policy if each.grad is not None]
        assert found == pytest.approx(expected, rel=1e-12), function.__name__


def test_sppo_hard_loss() -> None:
    """(x_c - 1)^2 + (x_r + 1)^2 at beta 0.5, for log-ratios (0, 0), (5, -5) and (-3, 1): 2, 32 and 20."""
    assert sppo_hard_loss(*log_probabilities(), beta=0.5).tolist() == [2.0, 32.0, 20.0]


def test_aot_loss() -> None:
    """Differences of the policy 10, 20, -4 and of the reference 10, 10, 0. Sorted: -4, 10, 20 less 0, 10, 10 is -4, 0, 10.

    At beta 0.5: log(1 + e^2), log 2, log(1 + e^-5), and with e = 0.1 a tenth of -2, 0 and 5 more.
    """
    expected = [math.log1p(math.exp(2)), LN2, math.log1p(math.exp(-5))]
    plain = aot_loss(*log_probabilities(), beta=0.5)
    assert plain.tolist() == pytest.approx(expected, rel=1e-12)
    smooth = aot_loss(*log_probabilities(), beta=0.5, label_smoothing=0.1)
    assert (smooth - plain).tolist() == pytest.approx([-0.2, 0.0, 0.5], abs=1e-12)


def test_aot_unpaired_loss() -> None:
    """Log-ratios of chosen answers 0, 5, -3 and of rejected ones 0, -5, 1. Sorted: -3, 0, 5 less -5, 0, 1 is 2, 0, 4.

    At beta 0.5: log(1 + e^-1), log 2, log(1 + e^-2).
    """
    expected = [math.log1p(math.exp(-1)), LN2, math.log1p(math.exp(-2))]
    assert aot_unpaired_loss(*log_probabilities(), beta=0.5).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", [aot_loss, aot_unpaired_loss])
def test_sorted_pairs_have_no_order(function: object) -> None:
    """The same pairs in another order lose the same, and the gradient goes back to where its answer stands."""
    order = torch.tensor([2, 0, 1])
    found = []
    for places in (torch.arange(3), order):
        chosen, *others = (each[places] for each in log_probabilities())
        policy = chosen.clone().requires_grad_()
        loss = function(policy, *others, beta=0.5)  # type: ignore[operator]
        loss.sum().backward()
        assert policy.grad is not None
        found.append((loss.tolist(), policy.grad[torch.argsort(places)].tolist()))
    assert found[0] == found[1]
