"""Losses over pairs of answers: the reward model's, and those of direct preference optimization.

N: pairs. `chosen_N` and `rejected_N` are what the model in training gives the two answers of each pair (a score, or a
log-probability), `ref_chosen_N` and `ref_rejected_N` the same of the reference. Every function returns one loss a pair.

Imports torch only where it computes, because `slipway plan` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def reward_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, margin: float = 0.0, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """The pairwise loss of a reward model: -log sigmoid(r_c - r_r - m) + k (r_c + r_r)^2.

    The first term is the negative log-likelihood of Bradley and Terry (1952) that the chosen answer wins, with a margin
    m as in Llama 2 (Touvron et al., 2023, section 3.2.2). The second holds the scores, of which the first sees only
    differences, around 0 (Eisenstein et al., 2023).
    """
    from torch.nn.functional import logsigmoid

    # logsigmoid, because log(sigmoid(x)) underflows for scores that are far apart.
    loss_N = -logsigmoid(chosen_N - rejected_N - margin)
    if center_rewards_coefficient:
        loss_N = loss_N + center_rewards_coefficient * (chosen_N + rejected_N).square()
    return loss_N


def implicit_margin(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """By how much the implicit reward beta log(pi / pi_ref) of the chosen answer exceeds the rejected one's.

    Rafailov et al. (2023), equation 5.
    """
    return beta * ((chosen_N - ref_chosen_N) - (rejected_N - ref_rejected_N))


def sigmoid_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: -(1 - e) log sigmoid(m) - e log sigmoid(-m), with m the implicit margin and e the label smoothing.

    Rafailov et al. (2023), equation 7; with e > 0, the conservative form for labels of which a share e is wrong
    (Mitchell, 2023, "A note on DPO with noisy preferences").
    """
    from torch.nn.functional import logsigmoid

    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    return -(1 - label_smoothing) * logsigmoid(margin_N) - label_smoothing * logsigmoid(-margin_N)


def hinge_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """max(0, 1 - m), with m the implicit margin (Zhao et al., 2023, SLiC; in this form Liu et al., 2024, RSO)."""
    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    return (1 - margin_N).clamp(min=0)


def ipo_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """(h - 1 / (2 beta))^2, with h the implicit margin at beta 1 (Azar et al., 2023, equation 17; beta is their tau).

    Takes log-probabilities averaged over tokens: summed ones would make the target 1 / (2 beta) mean less for a long
    answer than for a short one.
    """
    h_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=1.0)
    return (h_N - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of direct preference optimization, and what its callers must know of it."""

    function: Callable[..., Tensor]
    """(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, *, beta) -> loss_N."""
    averages_over_tokens: bool = False
    """Whether the log-probability of an answer is the mean of its tokens', instead of their sum."""
    takes_label_smoothing: bool = False
    """Whether the function has a parameter `label_smoothing`."""


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid_loss, takes_label_smoothing=True),
    "hinge": PreferenceLoss(hinge_loss),
    "ipo": PreferenceLoss(ipo_loss, averages_over_tokens=True),
}
