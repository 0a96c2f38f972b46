"""Losses of the policy by hand, against slow loops, and how tokens are added up. Against TRL: test_on_policy_against_trl.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.lib.formulas.policy_losses import (
    cispo_loss,
    gspo_loss,
    gspo_token_loss,
    ppo_clip_loss,
    sapo_loss,
)
from stages.lib.formulas.policy_table import AGGREGATIONS, POLICY_LOSSES
from tests.numerics.test_policy_gradient import ragged, tensor

LN2 = math.log(2)
OPTIONS: dict[str, dict[str, float]] = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.3},
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "gspo_token": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_high": 0.3},
    "sapo": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
}


def of_ratios(log_ratios: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """log pi with gradients, log pi_old and the mask of completions of these log ratios, in units of log 2; pi_old is 1/4."""
    width = max(map(len, log_ratios))
    mask_BK = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in log_ratios], dtype=torch.float64)
    ratios_BK = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in log_ratios], dtype=torch.float64)
    old_BK = -2 * LN2 * mask_BK
    return (old_BK + LN2 * ratios_BK).requires_grad_(), old_BK, mask_BK


def assert_near(found: Tensor | None, expected: list[list[float]]) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


# The losses by hand.


def test_clipped_policy_loss_by_hand() -> None:
    """Clipped at 1/2 and 5/4, at the ratios 2, 2, 1/4, 1/4, 1 and 1, each with a positive and a negative advantage.

    Ratio 2: A = 3 gives max(-6, -15/4) = -15/4, clipped; A = -3 gives max(6, 15/4) = 6, free.
    Ratio 1/4: A = 3 gives max(-3/4, -3/2) = -3/4, free; A = -3 gives max(3/4, 3/2) = 3/2, clipped.
    Ratio 1: -A, free. The gradient with regard to log pi is -A rho where the loss is free, and 0 where it is clipped.
    """
    log_ratio = tensor(LN2, LN2, -2 * LN2, -2 * LN2, 0, 0)
    old_logp, advantages = tensor(-1, -2, -3, -4, -5, -6), tensor(3, -3, 3, -3, 3, -3)
    logp = (old_logp + log_ratio).requires_grad_()
    loss, clipped = ppo_clip_loss(logp, old_logp, advantages, torch.ones(6), clip_low=0.5, clip_high=0.25)
    assert loss.tolist() == pytest.approx([-3.75, 6, -0.75, 1.5, -3, 3], abs=1e-12)
    assert clipped.tolist() == [1, 0, 0, 1, 0, 0]
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0, 6, -0.75, 0, -3, 3], abs=1e-12)


def test_clipped_policy_loss_against_a_slow_loop() -> None:
    mask_NK, (log_ratio_NK, advantages_NK) = ragged([50] * 4, 50, seed=9)
    old_logp_NK = mask_NK * -2
    loss_NK, clipped_NK = ppo_clip_loss(
        old_logp_NK + log_ratio_NK / 2, old_logp_NK, advantages_NK, mask_NK, clip_low=0.2, clip_high=0.3
    )
    decided = 0
    for log_ratio, advantage, loss, clipped in zip(
        *(each.flatten().tolist() for each in (log_ratio_NK / 2, advantages_NK, loss_NK, clipped_NK)), strict=True
    ):
        ratio = math.exp(log_ratio)
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
        assert loss == pytest.approx(-objective, abs=1e-6)
        outside = ratio > 1.3 if advantage > 0 else ratio < 0.8
        assert clipped == float(outside)
        decided += outside
    assert 20 < decided < 180, "the comparison would see little if hardly a token, or nearly every one, were clipped"


def test_a_bound_of_tokens_with_a_negative_advantage_by_hand() -> None:
    """Ratios 8, 2 and 8 with A = -3, -3 and 3, clipped at 1/2 and 5/4, and at most 3 times -A.

    max(24, 15/4) = 24 is more than 9: 9, without a gradient. max(6, 15/4) = 6, free: its gradient is -A rho = 6. Where the
    advantage is positive the upper clip decides, as ever: -15/4.
    """
    logp, old, mask = of_ratios([[3, 1, 3]])
    loss, clipped = ppo_clip_loss(
        logp, old, tensor(-3, -3, 3).view(1, 3), mask, clip_low=0.5, clip_high=0.25, dual_clip=3.0
    )
    assert_near(loss, [[9, 6, -3.75]])
    assert clipped.tolist() == [[1, 0, 1]]
    loss.sum().backward()
    assert_near(logp.grad, [[0, 6, 0]])


def test_gspo_by_hand() -> None:
    """Log ratios of 2 and 0 in units of log 2 are a mean of 1: s = 2 for both tokens. Of -1 alone: s = 1/2.

    Clipped at 3/4 and 3/2. A = 1: max(-2, -3/2) = -3/2 for both tokens, clipped. A = -1 below: max(1/2, 3/4) = 3/4, clipped.
    A third completion, of log ratios 1, -1 and 0, has s = 1, and A = 4: -4 for each token. Each of its tokens has a third
    in log s, so that the gradient of the sum of the three is -4 for each.
    """
    logp, old, mask = of_ratios([[2, 0], [-1], [1, -1, 0]])
    advantages = tensor(1, -1, 4).view(3, 1).expand(3, 3)
    loss, clipped = gspo_loss(logp, old, advantages, mask, clip_low=0.25, clip_high=0.5)
    assert_near(loss * mask, [[-1.5, -1.5, 0], [0.75, 0, 0], [-4, -4, -4]])
    assert (clipped * mask).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    (loss * mask).sum().backward()
    assert_near(logp.grad, [[0, 0, 0], [0, 0, 0], [-4, -4, -4]])


def test_gspo_token_by_hand() -> None:
    """Log ratios of 1 and -1: s = 1. With A = 2 and 6 the losses are -2 and -6 whichever way, and so are the gradients here.

    With the ratio of the whole completion the sum of both, -8 s, has the gradient -8 / 2 for either token.
    """
    advantages = tensor(2, 6).view(1, 2)
    logp, old, mask = of_ratios([[1, -1]])
    loss, _ = gspo_token_loss(logp, old, advantages, mask, clip_low=0.25, clip_high=0.5)
    assert_near(loss, [[-2, -6]])
    loss.sum().backward()
    assert_near(logp.grad, [[-2, -6]])
    logp, old, mask = of_ratios([[1, -1]])
    loss, _ = gspo_loss(logp, old, advantages, mask, clip_low=0.25, clip_high=0.5)
    assert_near(loss, [[-2, -6]])
    loss.sum().backward()
    assert_near(logp.grad, [[-4, -4]])


def test_both_forms_of_gspo_are_one_where_a_completion_has_one_advantage() -> None:
    """Summed over the tokens of each completion, in value and gradient; some completions are clipped, and some are not."""
    mask_BK, (log_ratio_BK, advantages_BK) = ragged([5, 1, 3, 8] * 8, 8, seed=3)
    advantages_BK = advantages_BK[:, :1].expand_as(advantages_BK)
    found = []
    for loss_of in (gspo_loss, gspo_token_loss):
        logp_BK = (log_ratio_BK / 4 * mask_BK - 2).requires_grad_()
        loss_BK, clipped_BK = loss_of(logp_BK, mask_BK * 0 - 2, advantages_BK, mask_BK, clip_low=0.1, clip_high=0.15)
        (loss_BK * mask_BK).sum().backward()
        assert 5 < clipped_BK[:, 0].sum() < 27
        found.append(((loss_BK * mask_BK).detach(), logp_BK.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_cispo_by_hand() -> None:
    """pi_old is 1/4; the ratios 2, 1/2 and 1 are weights of 3/2 (the bound 1 + 1/2), 1/2 and 1.

    With log pi = -1, -3 and -2 units of log 2 and A = 1, 1 and -2 the losses are 3/2, 3/2 and -4 units. The weights are
    constants: the gradients are -w A = -3/2, -1/2 and 2, also where the bound decided.
    """
    logp, old, mask = of_ratios([[1, -1, 0]])
    loss, clipped = cispo_loss(logp, old, tensor(1, 1, -2).view(1, 3), mask, clip_high=0.5)
    assert_near(loss, [[1.5 * LN2, 1.5 * LN2, -4 * LN2]])
    assert clipped.tolist() == [[1, 0, 0]]
    loss.sum().backward()
    assert_near(logp.grad, [[-1.5, -0.5, 2]])


def test_sapo_by_hand() -> None:
    """At the ratio 1 the gate is 2 / t: for t = 1 and A = 3, -6; for t = 2 and A = -3, 3. Its slope there is 1: gradients -A.

    At the ratio 2, with t = 1: 4 / (1 + 1 / e) = 4 e / (e + 1), of slope 4 e / (e + 1)^2 by rho, which moves by 2 per log pi.
    """
    logp, old, mask = of_ratios([[0, 0, 1]])
    loss, clipped = sapo_loss(
        logp, old, tensor(3, -3, 1).view(1, 3), mask, sapo_temperature_pos=1.0, sapo_temperature_neg=2.0
    )
    e = math.e
    assert_near(loss, [[-6, 3, -4 * e / (e + 1)]])
    assert not clipped.any()
    loss.sum().backward()
    assert_near(logp.grad, [[-3, 3, -8 * e / (e + 1) ** 2]])


# What all of them have in common.


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_the_ratio_1_all_have_the_gradient_of_reinforce(name: str) -> None:
    """-A for each token, which is where every rollout begins: losses differ only in what they do further off."""
    mask_BK, (logp_BK, advantages_BK) = ragged([5, 1, 3, 8], 8, seed=4)
    advantages_BK = advantages_BK[:, :1].expand_as(advantages_BK)
    logp_BK = (logp_BK * mask_BK).requires_grad_()
    loss_BK, clipped_BK = POLICY_LOSSES[name].function(
        logp_BK, logp_BK.detach(), advantages_BK, mask_BK, **OPTIONS[name]
    )
    assert not clipped_BK.any()
    (loss_BK * mask_BK).sum().backward()
    torch.testing.assert_close(logp_BK.grad, -advantages_BK * mask_BK, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_completion_does_not_see_those_beside_it_nor_padding(name: str) -> None:
    """Alone, without padding, each has the loss that it has beside longer ones, but for last bits: some processors take
    the elements of a wide tensor otherwise than those of a narrow one.
    """
    lengths = [5, 1, 3, 8]
    mask_BK, (log_ratio_BK, advantages_BK) = ragged(lengths, 8, seed=5)
    old_BK = -2 * mask_BK
    logp_BK = old_BK + log_ratio_BK / 4 * mask_BK
    function: Callable[..., Any] = POLICY_LOSSES[name].function
    whole = function(logp_BK, old_BK, advantages_BK, mask_BK, **OPTIONS[name])
    for row, length in enumerate(lengths):
        own = [each[row : row + 1, :length] for each in (logp_BK, old_BK, advantages_BK, mask_BK)]
        for together, alone in zip(whole, function(*own, **OPTIONS[name]), strict=True):
            torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_losses_against_a_slow_loop(name: str) -> None:
    """Each token by itself, from the formulas of the papers, with plain numbers."""
    lengths = [5, 1, 3, 8]
    mask_BK, (log_ratio_BK, advantages_BK) = ragged(lengths, 8, seed=6)
    old_BK = -2 * mask_BK
    logp_BK = old_BK + log_ratio_BK / 3 * mask_BK
    loss_BK, _ = POLICY_LOSSES[name].function(logp_BK, old_BK, advantages_BK, mask_BK, **OPTIONS[name])
    for row, length in enumerate(lengths):
        ratios = [math.exp(float(logp_BK[row, k] - old_BK[row, k])) for k in range(length)]
        whole = math.prod(ratios) ** (1 / length)
        for k, ratio in enumerate(ratios):
            advantage, logp = float(advantages_BK[row, k]), float(logp_BK[row, k])
            match name:
                case "ppo_clip":
                    objective = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
                case "gspo" | "gspo_token":
                    objective = min(whole * advantage, min(max(whole, 0.9), 1.15) * advantage)
                case "cispo":
                    objective = min(ratio, 1.3) * advantage * logp
                case "sapo":
                    t = 1.0 if advantage > 0 else 1.05
                    objective = 4 / t / (1 + math.exp(-t * (ratio - 1))) * advantage
            assert float(loss_BK[row, k]) == pytest.approx(-objective, abs=1e-12)


# From tokens to one number.


def mean_of(name: str, losses: Sequence[Sequence[float]], max_new_tokens: int) -> float:
    """The losses of the tokens of completions as one number, as the learner makes it."""
    lengths_B1 = torch.tensor([[float(len(each))] for each in losses])
    tokens = float(lengths_B1.sum())
    counts_B1 = AGGREGATIONS[name](lengths_B1, tokens=tokens, completions=len(losses), max_new_tokens=max_new_tokens)
    sums = [sum(each) * float(count) for each, count in zip(losses, counts_B1, strict=True)]
    return sum(sums) / tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 22 / 4),
        ("seq_mean_token_mean", (2 + 16) / 2),
        ("seq_mean_token_sum", (6 + 16) / 2),
        ("seq_mean_token_sum_norm", (6 + 16) / (2 * 8)),
    ],
)
def test_aggregations_by_hand(name: str, expected: float) -> None:
    """A completion of three tokens with the losses 1, 2 and 3, and one of a token with the loss 16; at most 8 tokens."""
    assert mean_of(name, [[1, 2, 3], [16]], 8) == pytest.approx(expected, abs=1e-6)


def test_what_a_token_counts_does_not_depend_on_its_completions_length() -> None:
    """Dr. GRPO's point: the same token counts as much in a long completion as in a short one; a mean over each is not so."""
    for name, equal in (("seq_mean_token_sum_norm", True), ("token_mean", True), ("seq_mean_token_mean", False)):
        counts_B1 = AGGREGATIONS[name](torch.tensor([[1.0], [7.0]]), tokens=8.0, completions=2, max_new_tokens=8)
        assert (counts_B1[0] == counts_B1[1]).item() is equal


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_completion_without_tokens_counts_for_nothing(name: str) -> None:
    counts_B1 = AGGREGATIONS[name](torch.tensor([[0.0], [4.0]]), tokens=4.0, completions=2, max_new_tokens=8)
    assert counts_B1.isfinite().all()


def test_a_mean_over_tokens_changes_no_bit() -> None:
    """It was the only one: what was trained before is trained the same."""
    counts_B1 = AGGREGATIONS["token_mean"](torch.tensor([[3.0], [7.0]]), tokens=10.0, completions=2, max_new_tokens=8)
    losses_BK = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(losses_BK * counts_B1, losses_BK)
