"""Losses over pairs, against numbers worked out by hand and against TRL's trainers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from stages.alignment.dpo import DPOParams
from stages.lib.formulas.preference_losses import (
    PREFERENCE_LOSSES,
    hinge_loss,
    implicit_margin,
    ipo_loss,
    reward_loss,
    sigmoid_loss,
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


@pytest.mark.parametrize(("name", "at_start"), [("sigmoid", LN2), ("hinge", 1.0), ("ipo", 25.0)])
def test_losses_at_the_reference(name: str, at_start: float) -> None:
    """A policy equal to its reference has margin 0 on every pair: log 2, 1, and (0 - 1 / 0.2)^2 = 25 at beta 0.1."""
    chosen, rejected = vectors([-3.25, -100.0], [-8.5, -0.125])
    loss = PREFERENCE_LOSSES[name].function(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([at_start, at_start], rel=1e-12)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_losses_depend_on_differences_only(name: str) -> None:
    """Adding c to an answer's log-probability under both policy and reference changes nothing: the ratio is the same."""
    function = PREFERENCE_LOSSES[name].function
    chosen, rejected, ref_chosen, ref_rejected = log_probabilities()
    moved = function(chosen + 7, rejected - 2, ref_chosen + 7, ref_rejected - 2, beta=0.5)
    assert torch.equal(moved, function(chosen, rejected, ref_chosen, ref_rejected, beta=0.5))


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_gradients_raise_the_chosen_answer(name: str) -> None:
    """At the reference every loss falls when the chosen answer becomes likelier and the rejected one less likely."""
    chosen, rejected = vectors([-3.0], [-4.0])
    policy = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    PREFERENCE_LOSSES[name].function(*policy, chosen, rejected, beta=0.1).sum().backward()
    assert policy[0].grad is not None and policy[1].grad is not None
    assert policy[0].grad.item() < 0 < policy[1].grad.item()
    assert policy[0].grad.item() == -policy[1].grad.item()


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


def test_the_recipe_offers_exactly_the_table() -> None:
    assert set(get_args(DPOParams.model_fields["loss"].annotation)) == set(PREFERENCE_LOSSES)
