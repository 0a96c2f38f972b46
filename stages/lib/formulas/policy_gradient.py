"""The mathematics of on-policy alignment: rewards per token, advantages, clipped losses, KL estimators and controllers.

N: completions of a rollout, B: of a micro batch, K: tokens of the longest completion, V: vocabulary. `mask_NK` is 1 for
each token that the policy wrote, the one that ends its turn included, and 0 for padding and for what the policy only read
between two turns; everything is 0 outside it.

PPO as Ziegler et al. (2019), Stiennon et al. (2020) and Ouyang et al. (2022) use it, with the details of Huang et al.
(2024, "The N+ implementation details of RLHF with PPO"). Nothing here knows of processes or micro batches: what is a
mean is given as a sum, and the caller divides by the number of tokens of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Log-probabilities and divergence


def logprobs_and_entropy(
    logits_BKV: Tensor, ids_BK: Tensor, *, temperature: float = 1.0, entropy_has_gradients: bool = True
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[id] and the entropy of that distribution in nats, each B x K in float32.

    The entropy is - sum p log p = logsumexp(z) - sum p z, with z the scaled logits. Its gradients would keep two more
    tensors of B x K x V for the backward pass: `entropy_has_gradients` is for losses that it is a term of.
    """
    scaled_BKV = logits_BKV.float() / temperature
    normalizer_BK = scaled_BKV.logsumexp(-1)
    chosen_BK = scaled_BKV.gather(-1, ids_BK.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_has_gradients and torch.is_grad_enabled()):
        entropy_BK = normalizer_BK - (scaled_BKV.softmax(-1) * scaled_BKV).sum(-1)
    return chosen_BK - normalizer_BK, entropy_BK


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log ref: unbiased, of high variance, negative for half of the tokens."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased, of low variance, never negative."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi): unbiased, of low variance, never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimates of KL(pi || ref) from one token drawn from pi (Schulman, 2020, "Approximating KL divergence")."""


# Masked statistics


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is 1."""
    return (values * mask).sum() / mask.sum()


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """The variance of the values where the mask is 1, around their mean, divided by their number."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Numbers that differ by no more than this part of the largest are equal: the rest is how they were added up."""


def all_equal(values_GS: Tensor) -> Tensor:
    """G x 1: whether the numbers of each row are equal, but for rounding."""
    spread_G1 = values_GS.amax(dim=1, keepdim=True) - values_GS.amin(dim=1, keepdim=True)
    return spread_G1 <= ROUNDING * values_GS.abs().amax(dim=1, keepdim=True)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over what the mask covers, 0 elsewhere.

    With `shift_mean` false the mean is added again: rewards are scaled, but keep their sign (Huang et al., 2024, 4).
    Equal numbers have a distance of 0 from their mean, whatever rounding makes of it: nothing is divided by next to nothing.
    """
    mean = masked_mean(values, mask)
    differs = ~all_equal(values[mask.bool()].view(1, -1)).squeeze()
    whitened = (values - mean) * differs * (masked_variance(values, mask) + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for one that knows only the mean; below, worse."""
    return 1 - masked_variance(returns - values, mask) / (masked_variance(returns, mask) + 1e-8)


# Rewards and advantages


def token_rewards(scores_N: Tensor, kl_NK: Tensor, mask_NK: Tensor, *, kl_coefficient: float) -> Tensor:
    """r_t = - beta kl_t, and the score of the whole completion on top at its last token. N x K.

    Ziegler et al. (2019), equation 2, spread over tokens as by Stiennon et al. (2020).
    """
    rewards_NK = -kl_coefficient * kl_NK * mask_NK
    last_N = mask_NK.shape[1] - 1 - mask_NK.flip(1).argmax(dim=1)
    rows_N = torch.arange(len(scores_N))
    rewards_NK[rows_N, last_N] += scores_N.to(rewards_NK.dtype)
    return rewards_NK


def generalized_advantages(
    rewards_NK: Tensor, values_NK: Tensor, mask_NK: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each N x K (Schulman et al., 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}, return_t = A_t + V_t. The episode ends with
    the completion: V and A behind its last token are 0, also where it was cut off. Where tokens within it are not the policy's,
    t + 1 is the next that is: what it reads between two turns takes no time.
    """
    values_NK, rewards_NK = values_NK * mask_NK, rewards_NK * mask_NK
    advantages_NK = torch.zeros_like(rewards_NK)
    following_N = torch.zeros_like(rewards_NK[:, 0])
    next_value_N = torch.zeros_like(following_N)
    for place in reversed(range(rewards_NK.shape[1])):
        is_said_N = mask_NK[:, place] > 0
        delta_N = rewards_NK[:, place] + gamma * next_value_N - values_NK[:, place]
        following_N = torch.where(is_said_N, delta_N + gamma * lam * following_N, following_N)
        next_value_N = torch.where(is_said_N, values_NK[:, place], next_value_N)
        advantages_NK[:, place] = following_N * mask_NK[:, place]
    return advantages_NK, (advantages_NK + values_NK) * mask_NK


def group_advantages(scores_N: Tensor, group_size: int, *, scale: bool, of_batch: bool = False) -> Tensor:
    """GRPO: (score - mean of its group), divided by the group's standard deviation with `scale`. Groups stand together.

    Shao et al. (2024, DeepSeekMath), section 4.1.2; without `scale`, Liu et al. (2025, Dr. GRPO), because the division
    weighs prompts by how little their completions differ. With `of_batch` by the deviation of all scores: Liu et al.
    (2025, "Tricks or traps?", Lite PPO). 0 in a group of equal scores.
    """
    groups_GS = scores_N.view(-1, group_size)
    centered_GS = (groups_GS - groups_GS.mean(dim=1, keepdim=True)) * ~all_equal(groups_GS)
    if scale:
        deviation = scores_N.std() if of_batch else groups_GS.std(dim=1, keepdim=True)
        centered_GS = centered_GS / (deviation + 1e-4)
    return centered_GS.flatten()


def leave_one_out_advantages(scores_N: Tensor, group_size: int) -> Tensor:
    """RLOO: each score minus the mean of the others in its group, 0 in a group of equal scores. Groups stand together.

    Ahmadian et al. (2024, "Back to basics"), equation 8; Kool et al. (2019).
    """
    groups_GS = scores_N.view(-1, group_size)
    others_GS = (groups_GS.sum(dim=1, keepdim=True) - groups_GS) / (group_size - 1)
    return ((groups_GS - others_GS) * ~all_equal(groups_GS)).flatten()


def best_against_worst(scores_N: Tensor, group_size: int) -> Tensor:
    """N: 1 for the best completion of each group, -1 for its worst, 0 for all others, and for all of a group of equal scores.

    Groups stand together. Of equal scores the first counts, on either side.
    """
    groups_GS = scores_N.view(-1, group_size)
    signs_GS = torch.zeros_like(groups_GS)
    signs_GS.scatter_(1, groups_GS.argmin(dim=1, keepdim=True), -1.0)
    signs_GS.scatter_(1, groups_GS.argmax(dim=1, keepdim=True), 1.0)
    return (signs_GS * ~all_equal(groups_GS)).flatten()


# Losses


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, and where the clip decided (1 or 0). Per token.

    As in the code of Schulman et al. (2017). With `clip` None: (V - R)^2 / 2.
    """
    free = (values - returns).square()
    if clip is None:
        return free / 2, torch.zeros_like(free)
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    clipped = (near - returns).square()
    return torch.maximum(free, clipped) / 2, (clipped > free).to(values.dtype)


def mismatch_weights(old_logp: Tensor, generator_logp: Tensor, *, cap: float | None) -> Tensor:
    """min(pi_old / pi_generator, cap) per token; 1 without a cap.

    Completions that another engine wrote follow its probabilities, not the trainer's: this puts the difference right
    (truncated importance sampling: Espeholt et al., 2018, section 4.1; Yao et al., 2025, for language models).
    """
    if cap is None:
        return torch.ones_like(old_logp)
    return (old_logp - generator_logp).exp().clamp(max=cap)


# What changes from rollout to rollout


LEAST_BETA, LARGEST_BETA = 1e-12, 1e12
"""How far a penalty can be led: below it is none, above it the loss is nothing else."""


@dataclass
class KLController:
    """The coefficient beta of the KL penalty, fixed, or led so that the KL comes to a target.

    Adaptive (Ziegler et al., 2019, section 2.2): e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + e n / horizon)
    with n the number of completions since the last update. Where n is more than the horizon, beta falls by a fifth per
    horizon at most, which leaves it above 0: a negative one would reward divergence.
    """

    coefficient: float
    target: float | None = None
    """Nats per completion; None: fixed."""
    horizon: float = 10_000.0
    """Completions over which beta can change by at most a fifth."""

    def update(self, kl: float, num_completions: int) -> None:
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            factor = max(1 + error * num_completions / self.horizon, 0.8 ** (num_completions / self.horizon))
            self.coefficient = min(max(self.coefficient * factor, LEAST_BETA), LARGEST_BETA)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, updated by batches (Chan et al., 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, scores_N: Tensor) -> None:
        scores_N = scores_N.double()
        count, mean = float(len(scores_N)), float(scores_N.mean())
        squares = float((scores_N - mean).square().sum())
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation, divided by the number; 1 while it is not known, as with scores that are all equal."""
        deviation = (self.squares / self.count) ** 0.5 if self.count > 1 else 0.0
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0

    def normalize(self, scores_N: Tensor) -> Tensor:
        """(score - mean) / deviation of all scores so far."""
        return (scores_N - self.mean) / self.deviation
