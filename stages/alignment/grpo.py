"""`grpo`: group relative policy optimization (Shao et al., 2024, DeepSeekMath): advantages without a critic.

Several completions of each prompt are each other's baseline: A = (score - mean of the group) / deviation of the group, for
every token of a completion. The divergence from the reference is a term of the loss. Unless a recipe says otherwise the loss
is a mean over all tokens of a step, as in DAPO (Yu et al., 2025), so that long completions are not taught less per token.
DAPO, Dr. GRPO, GSPO, CISPO and SAPO are options of this stage: the table in stages/README.md says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.stage import Context, Result
from stages.lib.formulas.bounds import Weight
from stages.lib.on_policy.params import GroupParams
from stages.lib.on_policy.stage import GroupAlgorithm, on_policy_stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.on_policy.experience import Experience


class GRPOParams(GroupParams):
    """How the policy is trained."""

    kl_coefficient: Weight = 0.04
    """Beta: weight of the divergence from the reference in the loss, per nat and token. 0: no reference is loaded."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the divergence of a token is estimated: k2 = (log pi - log ref)^2 / 2, k3 = ref / pi - 1 - log(ref / pi). As a loss, k1 would have a gradient that is 0 on average."""
    scale_by_deviation: bool = True
    """Whether advantages are divided by the deviation of their group. Without (Dr. GRPO), prompts on which all completions are nearly equal weigh less."""
    deviation_of: Literal["group", "batch"] = Field(default="group", exclude_if=lambda scores: scores == "group")
    """Whose deviation that is. group: of the completions of the same prompt; batch: of all completions of the rollout (Lite PPO)."""

    @model_validator(mode="after")
    def deviation_is_used(self) -> GRPOParams:
        if self.deviation_of != "group" and not self.scale_by_deviation:
            raise ValueError("deviation_of: batch has no effect with scale_by_deviation: false: remove one of them")
        return self


def run(ctx: Context, params: GRPOParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, GRPO(params))


STAGE = on_policy_stage(
    kind="grpo",
    version=5,
    summary="group relative policy optimization of a causal model: no critic, completions of a prompt compared",
    params=GRPOParams,
    run=run,
)


class GRPO(GroupAlgorithm[GRPOParams]):
    """Scores relative to those of the same prompt."""

    kl_in_loss = True

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A of every token, N x K; and in how many groups all scores are equal, so that they teach nothing."""
        from stages.lib.formulas.policy_gradient import all_equal, group_advantages

        mask_NK = experience.mask
        groups_GS = scores_N.view(-1, self.params.group_size)
        advantages_N = group_advantages(
            scores_N,
            self.params.group_size,
            scale=self.params.scale_by_deviation,
            of_batch=self.params.deviation_of == "batch",
        )
        equal = all_equal(groups_GS).double().mean()
        return advantages_N.unsqueeze(1) * mask_NK, mask_NK * 0, {"groups_without_signal": float(equal)}
