"""Losses over pairs of answers that see only by how much one is better: the reward model's, and DPO and its like.

N: pairs. `chosen_N` and `rejected_N` are what the model in training gives the two answers of each pair (a score, or a
log-probability), `ref_chosen_N` and `ref_rejected_N` the same of the reference. Every function returns one loss a pair.

What belongs to the prompt alone cancels in that difference. `preference_table.py` says what each of them needs; those that
look at either answer by itself stand in `answer_losses.py`, those without a reference in `reference_free_losses.py`.

Imports torch only where it computes, because `slipway plan` reads the table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def smoothed_logistic_loss(difference_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d): what it costs that the first of two wins, at log-odds d for it.

    The negative log-likelihood of Bradley and Terry (1952). With e > 0, the conservative form for labels of which a
    share e is the wrong way round (Mitchell, 2023, "A note on DPO with noisy preferences"; of reward models, Wang et
    al., 2024, "Secrets of RLHF in Large Language Models Part II"): lowest at d = log((1 - e) / e), not at infinity.
    The unbiased form of Chowdhury et al. (2024, robust DPO) is another one, without such a minimum.
    """
    from torch.nn.functional import logsigmoid

    # logsigmoid, because log(sigmoid(x)) underflows for values that are far apart.
    return -(1 - label_smoothing) * logsigmoid(difference_N) - label_smoothing * logsigmoid(-difference_N)


def reward_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    *,
    margin: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """The pairwise loss of a reward model: -(1 - e) log sigmoid(d) - e log sigmoid(-d) + k (r_c + r_r)^2, d = r_c - r_r - m.

    The first two terms are `smoothed_logistic_loss`, less a margin m, which is one number or one for each pair
    (margin_N): by how much the chosen answer is better, as in Llama 2 (Touvron et al., 2023, section 3.2.2). The last
    one holds the scores, of which the others see only differences, around 0 (Eisenstein et al., 2023).
    """
    loss_N = smoothed_logistic_loss(chosen_N - rejected_N - margin, label_smoothing)
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

    Rafailov et al. (2023), equation 7; with e > 0, the conservative form that `smoothed_logistic_loss` names.
    """
    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    return smoothed_logistic_loss(margin_N, label_smoothing)


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


def sigmoid_norm_loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, *, beta: float
) -> Tensor:
    """-log sigmoid(m), with m the implicit margin of log-probabilities averaged over tokens.

    The length-normalized DPO of Tulu 3 (Lambert et al., 2024). beta is then that of a token: 5 there.
    """
    return smoothed_logistic_loss(implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta))


def robust_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e): in the mean DPO's loss on labels that are right.

    Chowdhury et al. (2024, robust DPO): unbiased where a share e of the labels is the wrong way round. Unlike
    the conservative form (`smoothed_logistic_loss`) it may be negative, and has no minimum at a finite margin.
    """
    from torch.nn.functional import logsigmoid

    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    as_labelled_N, turned_N = -logsigmoid(margin_N), -logsigmoid(-margin_N)
    return ((1 - label_smoothing) * as_labelled_N - label_smoothing * turned_N) / (1 - 2 * label_smoothing)


def exo_pair_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """KL(q || p) with q = (sigmoid(m), sigmoid(-m)) and p = (1 - e, e): the policy's choice against the labels', reversed.

    EXO (Ji et al., 2024), equation 16; they take e = 0.001. Without label smoothing it would be infinite.
    """
    from torch.nn.functional import logsigmoid

    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    chosen_part_N = margin_N.sigmoid() * (logsigmoid(margin_N) - math.log1p(-label_smoothing))
    return chosen_part_N + (-margin_N).sigmoid() * (logsigmoid(-margin_N) - math.log(label_smoothing))


def discopop_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    discopop_temperature: float,
) -> Tensor:
    """-(1 - s) log sigmoid(m) + s exp(-m) with s = sigmoid(m / t): logistic below 0, exponential above, blended at 0.

    DiscoPOP (Lu et al., 2024), equation 5, with their t = 0.05. It is not convex: around 0, where a policy starts, it rises with
    the margin, as they say themselves, so that pairs are first pushed the wrong way. s exp(-m) is computed as exp(log s - m): as a product it is
    0 times infinity where the margin is far below 0.
    """
    from torch.nn.functional import logsigmoid

    margin_N = implicit_margin(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta=beta)
    sharp_N = margin_N / discopop_temperature
    return -logsigmoid(margin_N) * (-sharp_N).sigmoid() + (logsigmoid(sharp_N) - margin_N).exp()
