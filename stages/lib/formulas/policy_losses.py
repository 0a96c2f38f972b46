"""Losses of a policy on completions that an earlier policy wrote, and how the losses of tokens become one number.

B: completions, K: tokens of the longest. `mask_BK` is 1 for tokens of completions and 0 for padding. rho = pi / pi_old is
the ratio of a token, s = exp(mean over the completion's tokens of log rho) that of a whole completion. Every loss returns
two tensors B x K: the loss of each token, and 1 where a clip decided it, else 0; what stands outside of the mask counts for
nothing. `policy_table.py` says what each of them needs.

Imports no torch, because `slipway plan` reads the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def clipped_objective(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), at most -A dual_clip where A < 0; and where a bound decided (1 or 0).

    Schulman et al. (2017, PPO), equation 7; low = high = epsilon there. Apart, as in DAPO (Yu et al., 2025), equation 10.
    The bound of tokens with a negative advantage is that of Ye et al. (2020, dual-clip PPO).
    """
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, decided = free.maximum(clipped), clipped > free
    if dual_clip is not None:
        most = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > most)
        loss, decided = most.where(beyond, loss), decided | beyond
    return loss, decided.to(ratio.dtype)


def sequence_log_ratio(log_ratio_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """log s, B x 1: the mean of log rho over the tokens of each completion; 0 of one that has none."""
    return (log_ratio_BK * mask_BK).sum(-1, keepdim=True) / mask_BK.sum(-1, keepdim=True).clamp(min=1.0)


# The losses


def ppo_clip_loss(
    logp_BK: Tensor,
    old_logp_BK: Tensor,
    advantages_BK: Tensor,
    mask_BK: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped objective of the ratio of each token: that of PPO, GRPO, DAPO and Dr. GRPO; verl's `vanilla`."""
    ratio_BK = (logp_BK - old_logp_BK).exp()
    return clipped_objective(ratio_BK, advantages_BK, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def gspo_loss(
    logp_BK: Tensor,
    old_logp_BK: Tensor,
    advantages_BK: Tensor,
    mask_BK: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped objective of s, the ratio of the whole completion, for each of its tokens alike.

    Zheng et al. (2025, GSPO), equations 5 and 7. Completions are clipped whole. What a token adds to log s is its share.
    """
    ratio_B1 = sequence_log_ratio(logp_BK - old_logp_BK, mask_BK).exp()
    ratio_BK = ratio_B1.expand_as(logp_BK)
    return clipped_objective(ratio_BK, advantages_BK, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def gspo_token_loss(
    logp_BK: Tensor,
    old_logp_BK: Tensor,
    advantages_BK: Tensor,
    mask_BK: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped objective of sg(s) pi / sg(pi), where sg has no gradient: its value is s, its gradient that of one token.

    Zheng et al. (2025, GSPO), equations 13 and 14. Equal to `gspo_loss`, in value and gradient, where all tokens of a
    completion have one advantage and the mean is one over tokens and then completions; for advantages that differ.
    """
    log_ratio_B1 = sequence_log_ratio(logp_BK - old_logp_BK, mask_BK).detach()
    ratio_BK = (log_ratio_B1 + logp_BK - logp_BK.detach()).exp()
    return clipped_objective(ratio_BK, advantages_BK, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def cispo_loss(
    logp_BK: Tensor, old_logp_BK: Tensor, advantages_BK: Tensor, mask_BK: Tensor, *, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-sg(min(rho, 1 + high)) A log pi: REINFORCE with importance weights that are bounded, and constants.

    Chen et al. (2025, MiniMax-M1), equations 4 and 5, without a bound below, as they run it. A token beyond the bound
    goes on teaching, with the weight of the bound; where a ratio is clipped instead, it has no gradient.
    """
    ratio_BK = (logp_BK - old_logp_BK).exp().detach()
    weights_BK = ratio_BK.clamp(max=1 + clip_high)
    return -weights_BK * advantages_BK * logp_BK, (ratio_BK > 1 + clip_high).to(logp_BK.dtype)


def sapo_loss(
    logp_BK: Tensor,
    old_logp_BK: Tensor,
    advantages_BK: Tensor,
    mask_BK: Tensor,
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
) -> tuple[Tensor, Tensor]:
    """-A (4 / t) sigmoid(t (rho - 1)), with t by the sign of A: a gate whose slope is 1 at rho = 1 and fades on either side.

    Gao et al. (2025, SAPO). Nothing is clipped.
    """
    ratio_BK = (logp_BK - old_logp_BK).exp()
    positive_BK = (advantages_BK > 0).to(logp_BK.dtype)
    temperature_BK = sapo_temperature_pos * positive_BK + sapo_temperature_neg * (1 - positive_BK)
    gate_BK = (temperature_BK * (ratio_BK - 1)).sigmoid() * 4 / temperature_BK
    return -gate_BK * advantages_BK, ratio_BK.detach() * 0


# From losses of tokens to the loss of a step: what each token of a completion counts, as a multiple of 1 / tokens of the step.
# Nothing in it depends on the completions beside it in a micro batch, so that neither its size nor the number of processes does.


def token_mean(lengths_B1: Tensor, *, tokens: float, completions: int, max_new_tokens: int) -> Tensor:
    """A mean over all tokens of the step: long completions count more, each of their tokens as much as any other.

    Yu et al. (2025, DAPO), equation 8.
    """
    return lengths_B1 * 0 + 1


def seq_mean_token_mean(lengths_B1: Tensor, *, tokens: float, completions: int, max_new_tokens: int) -> Tensor:
    """A mean over the tokens of each completion, and then over completions: tokens of long ones count less.

    Shao et al. (2024, DeepSeekMath), equation 3; Zheng et al. (2025, GSPO), equation 5.
    """
    return tokens / (completions * lengths_B1.clamp(min=1.0))


def seq_mean_token_sum(lengths_B1: Tensor, *, tokens: float, completions: int, max_new_tokens: int) -> Tensor:
    """A sum over the tokens of each completion, and a mean over completions.

    With the ratio of whole completions it is LUSPO, in which each counts by its length.
    """
    return lengths_B1 * 0 + tokens / completions


def seq_mean_token_sum_norm(lengths_B1: Tensor, *, tokens: float, completions: int, max_new_tokens: int) -> Tensor:
    """The same, divided by a constant, the tokens that a completion may have: no length has a part in what a token counts.

    Liu et al. (2025, Dr. GRPO), section 3.2.
    """
    return lengths_B1 * 0 + tokens / (completions * max_new_tokens)
