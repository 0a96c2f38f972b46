"""`reinforce_plus_plus`: REINFORCE++ (Hu et al., 2025): advantages without a critic, normalized over the whole rollout.

A_t is the discounted sum of the rewards of tokens that follow, r_t = - beta k(t) + [t is the last] score, shifted and scaled
to mean 0 and deviation 1 over all tokens of the rollout: the baseline is the rollout, so that one completion of a prompt is
enough, and no prompt is weighed by how little its completions differ.

REINFORCE++-baseline is for several completions of each prompt, and for rewards that are not on one scale: the mean of the
prompt's completions is subtracted first, the normalization is the same, and the divergence is a term of the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.stage import Context, Result
from stages.lib.on_policy.params import GroupParams
from stages.lib.on_policy.stage import GroupAlgorithm, on_policy_stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.on_policy.experience import Experience


class ReinforcePlusPlusParams(GroupParams):
    """How the policy is trained."""

    completions_per_prompt: int = Field(default=1, ge=1)
    """Completions of each prompt in a rollout; a divisor of rollout_batch_size."""
    subtract_group_mean: bool = False
    """Whether the mean score of a prompt's completions is subtracted from each of them, with the divergence in the loss instead of the reward (REINFORCE++-baseline)."""
    gamma: float = Field(default=1.0, ge=1e-3, le=1)
    """Discount per token. With subtract_group_mean all tokens of a completion have one advantage, and it must be 1."""

    @model_validator(mode="after")
    def groups_are_there(self) -> ReinforcePlusPlusParams:
        if self.completions_per_prompt > 1:
            return self
        for name, given in (
            ("subtract_group_mean", self.subtract_group_mean),
            ("dynamic_sampling", self.dynamic_sampling is not None),
        ):
            if given:
                raise ValueError(
                    f"{name} compares the completions of a prompt, and completions_per_prompt is 1: take 4, or remove {name}"
                )
        return self

    @model_validator(mode="after")
    def baseline_fits(self) -> ReinforcePlusPlusParams:
        if not self.subtract_group_mean:
            return self
        if self.gamma != 1:
            raise ValueError("gamma has no effect with subtract_group_mean: remove it, or leave the mean where it is")
        if self.kl_coefficient and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 has a gradient of 0 on average as a term of the loss, which it is with"
                " subtract_group_mean: take k2, as its authors do, or k3"
            )
        return self


def run(ctx: Context, params: ReinforcePlusPlusParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, ReinforcePlusPlus(params))


STAGE = on_policy_stage(
    kind="reinforce_plus_plus",
    version=1,
    summary="REINFORCE++ of a causal model: no critic, advantages normalized over the whole rollout",
    params=ReinforcePlusPlusParams,
    run=run,
)


class ReinforcePlusPlus(GroupAlgorithm[ReinforcePlusPlusParams]):
    """What follows each token, or the score relative to those of the same prompt, normalized over all tokens of the rollout."""

    @property
    def kl_in_loss(self) -> bool:
        return self.params.subtract_group_mean

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A of every token, N x K.

        Where all scores are equal, the discounted penalty is all there is, and it is left as large as it is: normalized, it
        would move the policy as far as a real difference would.
        """
        from stages.lib.formulas import policy_gradient as pg

        mask_NK = experience.mask
        if self.params.subtract_group_mean:
            centered_N = pg.group_advantages(scores_N, self.params.group_size, scale=False)
            return pg.whiten(centered_N.unsqueeze(1) * mask_NK, mask_NK), mask_NK * 0, {}
        kl = pg.KL_ESTIMATORS[self.params.kl_estimator]
        kl_NK = kl(experience.padded("logprobs"), experience.padded("ref_logprobs")) * mask_NK
        differ = not bool(pg.all_equal(scores_N.view(1, -1)))
        rewards_NK = pg.token_rewards(
            scores_N if differ else 0 * scores_N, kl_NK, mask_NK, kl_coefficient=kl_coefficient
        )
        following_NK, _ = pg.generalized_advantages(rewards_NK, 0 * mask_NK, mask_NK, gamma=self.params.gamma, lam=1.0)
        return pg.whiten(following_NK, mask_NK) if differ else following_NK, mask_NK * 0, {}
