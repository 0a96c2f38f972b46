"""Learning from a rollout by pairs: the best completion of each prompt against its worst, by a loss over pairs of answers.

Guo et al. (2024, "Direct language model alignment from online AI feedback"). N: pairs of a micro batch, which is 2N
completions, those of a pair one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.stage import Context
from stages.lib.formulas import policy_gradient as pg
from stages.lib.formulas.preference_losses import implicit_margin
from stages.lib.formulas.token_losses import Tensors
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.learning import Learner
from stages.lib.on_policy.pair_params import PairParams
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Algorithm, Parts
from stages.lib.training.evaluating import Metrics
from stages.lib.training.params import Batch

OF_TOKENS = ("entropy", "policy_kl")
"""What is logged as a mean over tokens; all else is a mean over pairs."""


def make_learner(ctx: Context, params: OnPolicyParams, algorithm: Algorithm, parts: Parts, batch: Batch) -> Learner:
    """What takes the optimizer steps: on pairs of completions, or on single ones."""
    made = PairLearner if isinstance(params, PairParams) else Learner
    return made(ctx, params, algorithm, parts, batch)


def sign_of(episode: Episode) -> float:
    """1 for the better completion of a pair, -1 for the worse, 0 for one that nothing is learned from."""
    return float(episode.advantages[0])


class PairLearner(Learner):
    """Takes optimizer steps on pairs, whose order stands in the advantages: 1 for the better completion, -1 for the worse."""

    params: PairParams

    def taught_by(self, experience: Experience) -> Experience:
        """The best and the worst completion of each prompt; of one whose completions are equal, the first two, which teach nothing.

        So each rollout has the same number of pairs, and of steps.
        """
        size = self.params.group_size
        groups = [experience.episodes[start : start + size] for start in range(0, len(experience), size)]
        chosen = [[each for each in group if sign_of(each)] or group[:2] for group in groups]
        return Experience([episode for pair in chosen for episode in pair])

    def counted(self, episodes: Sequence[Episode]) -> float:
        """What the loss of a step is divided by: those of its pairs that teach something."""
        return float(np.sum([sign_of(each) > 0 for each in episodes]))

    def learned_tokens(self, episode: Episode) -> int:
        return len(episode.ids) if sign_of(episode) else 0

    def means(self, sums: Metrics, counted: float, tokens: float) -> Metrics:
        """What is logged of a step: means over tokens, over chats, or over pairs, and how many pairs there were."""
        pairs = sums["pairs"]
        divisors = {"ptx_loss": 1.0, "pairs": 1.0, **dict.fromkeys(OF_TOKENS, max(tokens, 1.0))}
        return {name: value / divisors.get(name, counted) for name, value in sums.items()} | {"pairs": pairs}

    def loss(self, batch: Tensors, pairs: float, totals: Tensors) -> Tensor:
        """This micro batch's part of the loss, which is the mean over the `pairs` of all micro batches of all processes.

        Pairs of equal scores are not in it. Adds the sums of what is logged to `totals`, in double precision.
        """
        params, mask_BK = self.params, batch["mask"]
        judged: Judged = self.parts.engine.forward(batch["input_ids"], batch["attention_mask"], mask_BK.shape[1])
        logp_BK = judged.logprobs.masked_fill(mask_BK == 0, 0.0)
        logp_B, ref_B = logp_BK.sum(dim=1), batch["ref_logprobs"].sum(dim=1)
        sums = chosen_and_rejected(batch["advantages"][:, 0], logp_B, ref_B)
        compared = sums
        if params.pair_loss.averages_over_tokens:
            tokens_B = mask_BK.sum(dim=1).clamp(min=1)  # none where nothing is learned from a pair
            compared = chosen_and_rejected(batch["advantages"][:, 0], logp_B / tokens_B, ref_B / tokens_B)
        loss_N = params.pair_loss.function(*compared, **params.pair_loss_options)
        with torch.no_grad():
            margin_N = implicit_margin(*sums, beta=params.kl_coefficient)
            terms = {
                "loss": loss_N,
                "margin": margin_N,
                "accuracy": wins_beyond_rounding(sums),
                "chosen_logprob_change": sums[0] - sums[2],
                "rejected_logprob_change": sums[1] - sums[3],
                "pairs": torch.ones_like(margin_N),
                "entropy": judged.entropy * mask_BK,
                # Of the policy that wrote the completions from the one now, estimated by k3.
                "policy_kl": pg.k3(batch["logprobs"], logp_BK) * mask_BK,
            }
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double().sum()
        return loss_N.sum() / pairs * self.ctx.world.size


def wins_beyond_rounding(sums: Sequence[Tensor]) -> Tensor:
    """1 where the implicit reward of the chosen completion is the higher one, 0 where it is the lower one, and one half where
    they differ by nothing but how log-probabilities were added up, as under a policy that is still its reference.
    """
    margin_N = implicit_margin(*sums, beta=1.0)
    apart_N = margin_N.abs() > pg.ROUNDING * torch.stack(list(sums)).abs().sum(dim=0)
    return torch.where(apart_N, (margin_N > 0).float(), 0.5)


def chosen_and_rejected(sign_B: Tensor, logp_B: Tensor, ref_B: Tensor) -> list[Tensor]:
    """`chosen_N, rejected_N, ref_chosen_N, ref_rejected_N` of the pairs that teach something."""
    signs_N2 = sign_B.view(-1, 2)
    taught_N2 = signs_N2[signs_N2[:, 0] != 0]
    better_N1 = (taught_N2 < 0).long()[:, :1]
    sides = []
    for values_B in (logp_B, ref_B):
        values_N2 = values_B.view(-1, 2)[signs_N2[:, 0] != 0]
        sides.append([values_N2.gather(1, place_N1).squeeze(1) for place_N1 in (better_N1, 1 - better_N1)])
    return [*sides[0], *sides[1]]
