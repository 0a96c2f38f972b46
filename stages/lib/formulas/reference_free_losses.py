"""Losses over pairs of answers that compare the policy with no reference.

N: pairs. `chosen_N` and `rejected_N` are the log-probabilities of the two answers of each pair, summed over tokens or their
mean, as `preference_table.py` says. Every function returns one loss a pair, so that no other pair of a micro batch plays a
part: the negative log-likelihood of a chosen answer is averaged over its own tokens, as in Pang et al. (2024, iterative
reasoning preference optimization) and in ORPO's P(y | x). TRL averages over all chosen tokens of a device's micro batch
instead (CPO, ORPO, and its loss sft), and ORPO's over those of the prompt too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.lib.formulas.preference_losses import smoothed_logistic_loss

if TYPE_CHECKING:
    from torch import Tensor


def sft_loss(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """-log pi(chosen), the mean over its tokens: a term that holds up the chosen answer (RPO; Pang et al., 2024).

    Beside a loss that sees only differences, because that falls too where both answers become less likely.
    """
    return -chosen_N


def simpo_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, beta: float, target_margin: float, label_smoothing: float = 0.0
) -> Tensor:
    """`smoothed_logistic_loss` of beta (c - r) - g: c and r are means over tokens, g is the margin to be reached.

    SimPO (Meng et al., 2024), equation 6; they take beta 2 to 2.5 (10 with some models) and g 0.3 to 1.6.
    """
    return smoothed_logistic_loss(beta * (chosen_N - rejected_N) - target_margin, label_smoothing)


def cpo_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    *,
    beta: float,
    nll_N: Tensor,
    nll_weight: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`smoothed_logistic_loss` of beta (c - r), and `nll_weight` x the chosen answer's negative log-likelihood per token.

    CPO (Xu et al., 2024), equation 3: DPO as if the reference found all answers alike, held up by cloning the chosen one.
    """
    return smoothed_logistic_loss(beta * (chosen_N - rejected_N), label_smoothing) + nll_weight * nll_N


CLOSEST_TO_CERTAIN = -1e-7
"""The highest log-probability per token whose odds are computed: p / (1 - p) has no bound."""


def log_odds(logp_N: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp), which is below 1. Constant from `CLOSEST_TO_CERTAIN` on."""
    import torch

    logp_N = logp_N.clamp(max=CLOSEST_TO_CERTAIN)
    # log(1 - exp(x)) loses digits by one way near 0, and by the other far from it (Maechler, 2012).
    return logp_N - torch.where(logp_N > -0.7, (-logp_N.expm1()).log(), (-logp_N.exp()).log1p())


def orpo_loss(chosen_N: Tensor, rejected_N: Tensor, *, beta: float) -> Tensor:
    """-c - beta log sigmoid(log odds(c) - log odds(r)), with c and r the means over tokens and odds(x) = p / (1 - p).

    ORPO (Hong et al., 2024); beta is their lambda. The first term is `sft_loss`.
    """
    return sft_loss(chosen_N, rejected_N) + beta * smoothed_logistic_loss(log_odds(chosen_N) - log_odds(rejected_N))
