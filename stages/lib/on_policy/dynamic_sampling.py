"""Dynamic sampling: groups whose completions all score alike teach nothing, so that others are drawn in their place.

Yu et al. (2025, DAPO), section 3.2. Prompts are taken in the order of the schedule, one batch after the other, until there
are enough groups or the bound is reached; the position that the next rollout begins at is in every checkpoint. Which groups
are kept depends on scores alone, which are the same in all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stages.lib.formulas.policy_gradient import all_equal
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.params import DynamicSamplingParams, GroupParams
from stages.lib.training.evaluating import Metrics


@dataclass(frozen=True)
class Drawn:
    """The completions that a rollout learns from, and how many were written for them."""

    experience: Experience
    num_completions: int
    num_tokens: float
    logged: Metrics = field(default_factory=dict)
    note: str = ""
    """What to say of it where something is amiss."""


def draw_groups(
    params: GroupParams,
    sampling: DynamicSamplingParams,
    first: int,
    complete: Callable[[Sequence[int]], Experience],
    scores_of: Callable[[Experience], Tensor],
    reward_names: Sequence[str],
) -> Drawn:
    """Completions at the positions from `first` on, until `rollout_batch_size` are in groups that teach something.

    Where the bound is reached before, the first groups without a signal make up the number, which is counted and said: a
    rollout always has its size. Groups that there are beyond it are left out as well.
    """
    size, group = sampling.gen_batch_size or params.rollout_batch_size, params.group_size
    wanted = params.rollout_batch_size // group
    kept: list[list[Episode]] = []
    without_signal: list[list[Episode]] = []
    scores: list[float] = []
    tokens, batches = 0.0, 0
    while len(kept) < wanted and batches < sampling.max_num_gen_batches:
        experience = complete(range(first + batches * size, first + (batches + 1) * size))
        batches += 1
        scores_N = scores_of(experience)
        scores += scores_N.tolist()
        tokens += float(experience.lengths.sum())
        compared_N = compared(experience, scores_N, sampling.metric, reward_names)
        for number, equal in enumerate(all_equal(compared_N.view(-1, group)).flatten().tolist()):
            episodes = experience.episodes[number * group : (number + 1) * group]
            (without_signal if equal else kept).append(episodes)
    chosen, missing = kept[:wanted], max(0, wanted - len(kept))
    filled = without_signal[:missing]
    logged: Metrics = {
        "generation_batches": batches,
        "groups_drawn": len(kept) + len(without_signal),
        "groups_left_out": len(without_signal) - len(filled),
        "groups_surplus": len(kept) - len(chosen),
        "groups_filled": len(filled),
        "reward_drawn": float(np.mean(scores)),
    }
    note = (
        f"{len(kept)} of {len(kept) + len(without_signal)} groups score differently after {batches} batches, and {wanted} are"
        f" wanted: {len(filled)} that teach nothing make up the number. Raise dynamic_sampling.max_num_gen_batches, or look"
        " at the prompts: they may be too easy or too hard by now"
    )
    episodes = [episode for each in [*chosen, *filled] for episode in each]
    return Drawn(Experience(episodes), batches * size, tokens, logged, note if filled else "")


def compared(experience: Experience, scores_N: Tensor, metric: str | None, reward_names: Sequence[str]) -> Tensor:
    """What must differ within a group: the whole score, or the reward that `metric` names. N."""
    if metric is None:
        return scores_N
    return experience.rewards[:, reward_names.index(metric)].to(torch.float64)
