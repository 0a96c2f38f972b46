"""`rloo`: REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, "Back to basics"): advantages without a critic.

The reward of a completion is its score less beta times its whole divergence from the reference; its advantage is that
less the mean of the other completions of the same prompt. With one pass per rollout the loss's gradient is REINFORCE's;
with more, the clipped ratio keeps the policy near the one that wrote the completions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.stage import Context, Result
from stages.lib.on_policy.params import GroupParams
from stages.lib.on_policy.stage import GroupAlgorithm, on_policy_stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.on_policy.experience import Experience


class RLOOParams(GroupParams):
    """How the policy is trained."""

    whiten_advantages: bool = False
    """Whether advantages are shifted to mean 0 and scaled to deviation 1, over the whole rollout."""


def run(ctx: Context, params: RLOOParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, RLOO(params))


STAGE = on_policy_stage(
    kind="rloo",
    version=5,
    summary="REINFORCE with a leave-one-out baseline: no critic, completions of a prompt compared",
    params=RLOOParams,
    run=run,
)


class RLOO(GroupAlgorithm[RLOOParams]):
    """Scores with the KL penalty in them, less the mean of the others of the same prompt."""

    kl_in_loss = False

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A of every token, N x K: the same for all tokens of a completion."""
        from stages.lib.formulas import policy_gradient as pg

        mask_NK = experience.mask
        kl = pg.KL_ESTIMATORS[self.params.kl_estimator]
        kl_N = (kl(experience.padded("logprobs"), experience.padded("ref_logprobs")) * mask_NK).sum(dim=1)
        advantages_N = pg.leave_one_out_advantages(scores_N - kl_coefficient * kl_N, self.params.group_size)
        advantages_NK = advantages_N.unsqueeze(1) * mask_NK
        if self.params.whiten_advantages:
            advantages_NK = pg.whiten(advantages_NK, mask_NK)
        return advantages_NK, mask_NK * 0, {}
