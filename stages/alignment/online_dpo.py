"""`online_dpo`: direct preference optimization on pairs of the policy's own completions, ranked as they are written.

Guo et al. (2024, "Direct language model alignment from online AI feedback"): in each rollout the policy as it is now writes
several completions of each prompt, the rewards of the stage rank them, and the best against the worst is a pair for a loss of
the stage `dpo`, with the reference's log-probabilities from the rollout. Prompts whose completions all score alike teach
nothing: they are counted, and left out of the loss. Nothing but the order of two completions is learned, so that neither scale
nor offset of a reward plays a part, and there are no advantages, no critic and no clipping.

`dpo` after `sample_preferences` is the same with the pairs of one policy for a whole training; here they follow it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.stage import Context, Result
from stages.lib.on_policy.pair_params import PairParams
from stages.lib.on_policy.stage import GroupAlgorithm, on_policy_stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.on_policy.experience import Experience


class OnlineDPOParams(PairParams):
    """How the policy is trained."""


def run(ctx: Context, params: OnlineDPOParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, OnlineDPO(params))


STAGE = on_policy_stage(
    kind="online_dpo",
    version=1,
    summary="direct preference optimization of a causal model on pairs of its own completions, ranked by rewards",
    params=OnlineDPOParams,
    run=run,
    headline=("heldout_win_rate",),
)


class OnlineDPO(GroupAlgorithm[OnlineDPOParams]):
    """The best completion of each prompt against its worst."""

    kl_in_loss = False

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """For every token, N x K, 1 where its completion is the better one of a pair, -1 where it is the worse, else 0."""
        from stages.lib.formulas.policy_gradient import best_against_worst

        mask_NK = experience.mask
        signs_N = best_against_worst(scores_N, self.params.group_size)
        best, worst = scores_N[signs_N > 0], scores_N[signs_N < 0]
        groups = len(scores_N) // self.params.group_size
        logged = {
            "pairs_left_out": float(groups - len(best)),
            "groups_without_signal": 1 - len(best) / groups,
            "score_margin": float((best - worst).sum()) / max(len(best), 1),
        }
        return signs_N.unsqueeze(1) * mask_NK, mask_NK * 0, logged
