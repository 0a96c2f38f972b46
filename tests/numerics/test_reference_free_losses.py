"""Losses without a reference, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.lib.formulas.reference_free_losses import cpo_loss, log_odds, orpo_loss, sft_loss, simpo_loss
from tests.numerics.test_preference_losses import LN2, vectors


def test_sft_loss() -> None:
    """-c, whatever r is."""
    assert sft_loss(*vectors([-1.5, -0.25], [-1.0, -9.0])).tolist() == [1.5, 0.25]


def test_simpo_loss() -> None:
    """beta (c - r) - g with beta 2 and g 0.5: 2 x 1 - 0.5 = 1.5 and 2 x -0.25 - 0.5 = -1; with e = 0.1 a tenth of it more."""
    answers = vectors([-1.0, -1.5], [-2.0, -1.25])
    plain = simpo_loss(*answers, beta=2.0, target_margin=0.5)
    assert plain.tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log1p(math.e)], rel=1e-12)
    smooth = simpo_loss(*answers, beta=2.0, target_margin=0.5, label_smoothing=0.1)
    assert (smooth - plain).tolist() == pytest.approx([0.15, -0.1], rel=1e-12)


def test_cpo_loss() -> None:
    """log(1 + exp(-0.1 x 10)) + 0.5 x 3, and log 2 + 0.5 x 1."""
    chosen, rejected, nll = vectors([-30.0, -5.0], [-40.0, -5.0], [3.0, 1.0])
    loss = cpo_loss(chosen, rejected, beta=0.1, nll_N=nll, nll_weight=0.5)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1)) + 1.5, LN2 + 0.5], rel=1e-12)


def test_orpo_loss() -> None:
    """p = 1/2 has the odds 1, q = 1/4 the odds 1/3: their ratio is 3, sigmoid(log 3) = 3/4, log 2 + 0.1 log(4/3).

    The other way round sigmoid(-log 3) = 1/4: log 4 + 0.1 log 4.
    """
    half, quarter = -LN2, -2 * LN2
    loss = orpo_loss(*vectors([half, quarter], [quarter, half]), beta=0.1)
    assert loss.tolist() == pytest.approx([LN2 + 0.1 * math.log(4 / 3), 2.2 * LN2], rel=1e-12)


def test_log_odds_keep_their_digits() -> None:
    """log(p / (1 - p)) of log p = -x is -log(e^x - 1): x - x^2/2 off log x near 0, and -x for large ones."""
    exact = [-math.log(math.expm1(x)) for x in (1e-4, 0.5, 0.9, 5.0)] + [-50.0]
    found = log_odds(torch.tensor([-1e-4, -0.5, -0.9, -5.0, -50.0]))
    assert found.tolist() == pytest.approx(exact, rel=1e-5)


def test_a_certain_answer_has_a_finite_loss() -> None:
    """A log-probability that is rounded to 0 has infinite odds: taken for 1e-7, whose odds are 1e7, and no gradient comes of it."""
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.full((1,), -1.0, requires_grad=True)
    loss = orpo_loss(chosen, rejected, beta=0.1)
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == -1.0, "the likelihood's alone"
    assert math.isfinite(loss.item()) and math.isfinite(rejected.grad.item())
