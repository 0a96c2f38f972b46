"""Losses over pairs of answers that look at either answer by itself, or sort the answers of many pairs.

N: pairs. `chosen_N` and `rejected_N` are the log-probabilities of the two answers of each pair under the policy,
`ref_chosen_N` and `ref_rejected_N` those under the reference. The implicit reward of an answer is r = beta log(pi / pi_ref).
Every function returns N losses, one a pair where it does not sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.lib.formulas.preference_losses import smoothed_logistic_loss

if TYPE_CHECKING:
    from torch import Tensor


def nca_pair_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """-log sigmoid(r_c) - (log sigmoid(-r_c) + log sigmoid(-r_r)) / 2.

    NCA for two answers (Chen et al., 2024, noise contrastive alignment): the chosen answer's likelihood is held up, because
    its own reward counts and not only the difference.
    """
    from torch.nn.functional import logsigmoid

    chosen_reward_N, rejected_reward_N = beta * (chosen_N - ref_chosen_N), beta * (rejected_N - ref_rejected_N)
    return -logsigmoid(chosen_reward_N) - 0.5 * logsigmoid(-chosen_reward_N) - 0.5 * logsigmoid(-rejected_reward_N)


def bco_pair_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    mean_reward: float = 0.0,
    reward_shift: float = 1.0,
) -> Tensor:
    """-log sigmoid(r_c - d) - log sigmoid(-(r_r - d)), with d = `reward_shift` x `mean_reward`, which is no function of pi.

    BCO (Jung et al., 2024): good or bad is each answer by itself, as measured from the mean reward of both. With
    `reward_shift` 0 it is what TRL 1.x calls bco_pair.
    """
    from torch.nn.functional import logsigmoid

    shift = reward_shift * mean_reward
    chosen_reward_N, rejected_reward_N = beta * (chosen_N - ref_chosen_N), beta * (rejected_N - ref_rejected_N)
    return -logsigmoid(chosen_reward_N - shift) - logsigmoid(shift - rejected_reward_N)


def apo_zero_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """1 - sigmoid(r_c) + sigmoid(r_r): makes the chosen answer likelier and the rejected one less likely.

    APO-zero (D'Oosterlinck et al., 2024), equation 7, and 1: for chosen answers that are better than the model's own.
    """
    chosen_reward_N, rejected_reward_N = beta * (chosen_N - ref_chosen_N), beta * (rejected_N - ref_rejected_N)
    return 1 - chosen_reward_N.sigmoid() + rejected_reward_N.sigmoid()


def apo_down_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """sigmoid(r_c) + 1 - sigmoid(r_c - r_r): makes both answers less likely, the rejected one more so.

    APO-down (D'Oosterlinck et al., 2024), equation 8, and 1: for chosen answers that are worse than the model's own.
    """
    chosen_reward_N, rejected_reward_N = beta * (chosen_N - ref_chosen_N), beta * (rejected_N - ref_rejected_N)
    return chosen_reward_N.sigmoid() + 1 - (chosen_reward_N - rejected_reward_N).sigmoid()


def sppo_hard_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """(x_c - 1 / (2 beta))^2 + (x_r + 1 / (2 beta))^2, with x = log(pi / pi_ref) of an answer.

    SPPO (Wu et al., 2024), equation 4.7, with 1 for the probability that the chosen answer wins; 1 / beta is their eta.
    """
    target = 1 / (2 * beta)
    return (chosen_N - ref_chosen_N - target).square() + (rejected_N - ref_rejected_N + target).square()


def aot_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`smoothed_logistic_loss` of beta (u - v), both sorted: u = log(pi_c / pi_r) of each pair, v the reference's.

    AOT on pairs (Melnyk et al., 2024, distributional preference alignment via optimal transport): the policy's whole
    distribution of log-ratios is to lie above the reference's, quantile by quantile. What a pair loses depends on the others.
    """
    policy_N, reference_N = (chosen_N - rejected_N).sort().values, (ref_chosen_N - ref_rejected_N).sort().values
    return smoothed_logistic_loss(beta * (policy_N - reference_N), label_smoothing)


def aot_unpaired_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`smoothed_logistic_loss` of beta (u - v), both sorted: u = log(pi / pi_ref) of chosen answers, v of rejected ones.

    Unpaired AOT (Melnyk et al., 2024): which chosen answer stood beside which rejected one plays no part.
    """
    good_N, bad_N = (chosen_N - ref_chosen_N).sort().values, (rejected_N - ref_rejected_N).sort().values
    return smoothed_logistic_loss(beta * (good_N - bad_N), label_smoothing)
