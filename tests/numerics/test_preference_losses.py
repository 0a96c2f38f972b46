"""Losses of the difference of two answers, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.lib.formulas.preference_losses import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    implicit_margin,
    ipo_loss,
    reward_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
)

LN2 = math.log(2)


def vectors(*columns: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in columns]


def log_probabilities() -> list[torch.Tensor]:
    """Three pairs of which the policy moved both answers by log-ratios (0, 0), (5, -5) and (-3, 1).

    The differences of the log-ratios are 0, 10 and -4.
    """
    return vectors([-20.0, -15.0, -13.0], [-30.0, -35.0, -9.0], [-20.0, -20.0, -10.0], [-30.0, -30.0, -10.0])


def test_implicit_margin() -> None:
    """At beta 0.5 the differences 0, 10 and -4 are worth 0, 5 and -2."""
    assert implicit_margin(*log_probabilities(), beta=0.5).tolist() == [0.0, 5.0, -2.0]


def test_sigmoid_loss() -> None:
    """-log sigmoid(m) = log(1 + exp(-m)) for the margins 0, 5 and -2: log 2, log(1 + e^-5), log(1 + e^2)."""
    loss = sigmoid_loss(*log_probabilities(), beta=0.5)
    assert loss.tolist() == pytest.approx([LN2, math.log1p(math.exp(-5)), math.log1p(math.exp(2))], rel=1e-12)


def test_sigmoid_loss_with_label_smoothing() -> None:
    """(1 - e) log(1 + exp(-m)) + e log(1 + exp(m)); as log(1 + exp(m)) = m + log(1 + exp(-m)), it is e m more than without.

    With e = 0.1 and the margins 0, 5 and -2 that is 0, 0.5 and -0.2 more.
    """
    plain = sigmoid_loss(*log_probabilities(), beta=0.5)
    smooth = sigmoid_loss(*log_probabilities(), beta=0.5, label_smoothing=0.1)
    assert (smooth - plain).tolist() == pytest.approx([0.0, 0.5, -0.2], rel=1e-12)


def test_hinge_loss() -> None:
    """max(0, 1 - m) for the margins 0, 5 and -2: 1, 0 and 3."""
    assert hinge_loss(*log_probabilities(), beta=0.5).tolist() == [1.0, 0.0, 3.0]


def test_ipo_loss() -> None:
    """(h - 1 / (2 beta))^2 with h = 0, 10, -4 and beta 0.5, so that the target is 1: 1, 81 and 25."""
    assert ipo_loss(*log_probabilities(), beta=0.5).tolist() == [1.0, 81.0, 25.0]


def test_sigmoid_norm_loss() -> None:
    """log(1 + exp(-m)) of log-probabilities per token: the formula of DPO, for the margins 0, 5 and -2."""
    loss = sigmoid_norm_loss(*log_probabilities(), beta=0.5)
    assert loss.tolist() == pytest.approx([LN2, math.log1p(math.exp(-5)), math.log1p(math.exp(2))], rel=1e-12)


def test_robust_loss() -> None:
    """((1 - e) L(m) - e L(-m)) / (1 - 2 e) with L(m) = log(1 + exp(-m)) and L(-m) = m + L(m) is L(m) - m e / (1 - 2 e).

    With e = 0.1 that is m / 8 less than without: 0, 0.625 and -0.25 less.
    """
    plain = sigmoid_loss(*log_probabilities(), beta=0.5)
    loss = robust_loss(*log_probabilities(), beta=0.5, label_smoothing=0.1)
    assert (plain - loss).tolist() == pytest.approx([0.0, 0.625, -0.25], rel=1e-12)


def test_robust_loss_is_unbiased() -> None:
    """If a share e of the labels is turned, the mean (1 - e) f(m) + e f(-m) is DPO's loss on labels that are right."""
    chosen, rejected = vectors([3.0], [1.0])
    (zero,) = vectors([0.0])
    right, turned = (
        robust_loss(*pair, zero, zero, beta=0.7, label_smoothing=0.3).item()
        for pair in ((chosen, rejected), (rejected, chosen))
    )
    expected = sigmoid_loss(chosen, rejected, zero, zero, beta=0.7).item()
    assert 0.7 * right + 0.3 * turned == pytest.approx(expected, rel=1e-12)


def test_exo_pair_loss() -> None:
    """KL((s, 1 - s) || (0.8, 0.2)) with s = sigmoid(m).

    m = 0: (1/2) log(1/4 / (0.8 x 0.2)) = (1/2) log 1.5625 = log 1.25. m = log 4: s is 0.8, the same distribution: 0.
    m = -log 4: 0.2 log(0.2 / 0.8) + 0.8 log(0.8 / 0.2) = 0.6 log 4.
    """
    chosen, zero = vectors([0.0, math.log(4), -math.log(4)], [0.0, 0.0, 0.0])
    loss = exo_pair_loss(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.2)
    assert loss.tolist() == pytest.approx([math.log(1.25), 0.0, 0.6 * math.log(4)], abs=1e-12)


def test_discopop_loss() -> None:
    """(1 - s) log(1 + exp(-m)) + s exp(-m), s = sigmoid(20 m). m = 0: s = 1/2, log(2) / 2 + 1/2.

    m = 5: s is 1 but for e^-100, exp(-5). m = -2: s is e^-40, log(1 + exp(2)).
    """
    loss = discopop_loss(*log_probabilities(), beta=0.5, discopop_temperature=0.05)
    assert loss.tolist() == pytest.approx([LN2 / 2 + 0.5, math.exp(-5), math.log1p(math.exp(2))], rel=1e-12)


def test_discopop_rises_where_a_policy_starts() -> None:
    """At m = 0 the slope is -(1/2) / 2 - 1/2 + (1 - log 2) s', with s' = 1 / (4 t) = 5 at t = 0.05: 0.784."""
    (zero,) = vectors([0.0])
    chosen = zero.clone().requires_grad_()
    discopop_loss(chosen, zero, zero, zero, beta=1.0, discopop_temperature=0.05).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.75 + 5 * (1 - LN2), rel=1e-12)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_discopop_is_finite_far_from_0(margin: float) -> None:
    """exp(10000) is infinite and sigmoid(-200000) is 0, but their product is 0: log(1 + exp(10000)) = 10000 is left."""
    chosen, zero = (each.float() for each in vectors([margin], [0.0]))
    policy = chosen.clone().requires_grad_()
    loss = discopop_loss(policy, zero, zero, zero, beta=1.0, discopop_temperature=0.05)
    loss.sum().backward()
    assert loss.tolist() == [max(0.0, -margin)]
    assert policy.grad is not None and policy.grad.item() == (-1.0 if margin < 0 else 0.0)


def test_sigmoid_gradient() -> None:
    """d/dm log(1 + exp(-m)) = -sigmoid(-m), and dm/dchosen = beta: at m = 0 and beta 0.1 the gradient is -0.05."""
    (zero,) = vectors([0.0])
    chosen = zero.clone().requires_grad_()
    sigmoid_loss(chosen, zero, zero, zero, beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.05, rel=1e-12)


def test_reward_loss() -> None:
    """log(1 + exp(-d)) for the differences 0, 2 and -1: log 2, log(1 + e^-2), log(1 + e)."""
    loss = reward_loss(*vectors([1.0, 3.0, 0.0], [1.0, 1.0, 1.0]))
    assert loss.tolist() == pytest.approx([LN2, math.log1p(math.exp(-2)), math.log1p(math.e)], rel=1e-12)


def test_reward_loss_with_margin_and_centering() -> None:
    """With margin 2 the differences count as -2, 0 and -3; the sums 2, 4 and 1 add 0.01 x their squares: 0.04, 0.16, 0.01."""
    loss = reward_loss(*vectors([1.0, 3.0, 0.0], [1.0, 1.0, 1.0]), margin=2.0, center_rewards_coefficient=0.01)
    expected = [math.log1p(math.exp(2)) + 0.04, LN2 + 0.16, math.log1p(math.exp(3)) + 0.01]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_reward_loss_with_a_margin_for_each_pair() -> None:
    """The differences 0, 2 and -1 less the margins 0, 2 and 1 are 0, 0 and -2: log 2, log 2, log(1 + e^2)."""
    loss = reward_loss(*vectors([1.0, 3.0, 0.0], [1.0, 1.0, 1.0]), margin=vectors([0.0, 2.0, 1.0])[0])
    assert loss.tolist() == pytest.approx([LN2, LN2, math.log1p(math.exp(2))], rel=1e-12)


def test_reward_loss_with_label_smoothing() -> None:
    """(1 - e) log(1 + exp(-d)) + e log(1 + exp(d)) is e d more than without smoothing, with d less its margin.

    With e = 0.1 the differences 0, 2 and -1 give 0, 0.2 and -0.1 more; less a margin of 2 they are -2, 0 and -3, and give
    -0.2, 0 and -0.3 more.
    """
    scores = vectors([1.0, 3.0, 0.0], [1.0, 1.0, 1.0])
    smooth = reward_loss(*scores, label_smoothing=0.1) - reward_loss(*scores)
    assert smooth.tolist() == pytest.approx([0.0, 0.2, -0.1], abs=1e-12)
    smooth = reward_loss(*scores, margin=2.0, label_smoothing=0.1) - reward_loss(*scores, margin=2.0)
    assert smooth.tolist() == pytest.approx([-0.2, 0.0, -0.3], abs=1e-12)


def test_label_smoothing_has_enough_somewhere() -> None:
    """d/dd = -(1 - e) sigmoid(-d) + e sigmoid(d) is 0 at d = log((1 - e) / e): with e = 0.2, at log 4 = -log(1/4).

    There sigmoid(d) = 4/5 and sigmoid(-d) = 1/5: -0.8 x 0.2 + 0.2 x 0.8. Without smoothing it is still -1/5.
    """
    chosen, rejected = vectors([math.log(4)], [0.0])
    for label_smoothing, expected in ((0.2, 0.0), (0.0, -0.2)):
        score = chosen.clone().requires_grad_()
        reward_loss(score, rejected, label_smoothing=label_smoothing).sum().backward()
        assert score.grad is not None
        assert score.grad.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_losses_are_finite_where_a_sigmoid_underflows(difference: float) -> None:
    """sigmoid(-10000) is 0 in floating point and its logarithm is not finite; log(1 + exp(10000)) is 10000, log(1 + 0) is 0."""
    (scores, zero) = vectors([difference], [0.0])
    expected = [max(0.0, -difference)]
    assert reward_loss(scores, zero).tolist() == expected
    assert sigmoid_loss(scores, zero, zero, zero, beta=1.0).tolist() == expected
