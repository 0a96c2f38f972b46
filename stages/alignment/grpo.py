"""`grpo`: group relative policy optimization (Shao et al., 2024, DeepSeekMath): advantages without a critic.

Several completions of each prompt are each other's baseline: A = (score - mean of the group) / deviation of the group, for
every token of a completion. The divergence from the reference is a term of the loss. The loss is a mean over all tokens of
a step, as in DAPO (Yu et al., 2025), so that long completions are not taught less per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline.stage import Context, Result, Stage
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import Weight
from stages.lib.on_policy.params import INPUTS, GroupParams, check_on_policy, estimate_on_policy

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.formulas.policy_gradient import KLController
    from stages.lib.on_policy.experience import Experience


class GRPOParams(GroupParams):
    """How the policy is trained."""

    kl_coefficient: Weight = 0.04
    """Beta: weight of the divergence from the reference in the loss, per nat and token. 0: no reference is loaded."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the divergence of a token is estimated: k2 = (log pi - log ref)^2 / 2, k3 = ref / pi - 1 - log(ref / pi). As a loss, k1 would have a gradient that is 0 on average."""
    scale_by_deviation: bool = True
    """Whether advantages are divided by the deviation of their group. Without (Dr. GRPO), prompts on which all completions are nearly equal weigh less."""


class GRPO:
    """Scores relative to those of the same prompt."""

    kl_in_loss = True
    value_coefficient = 0.0

    def __init__(self, params: GRPOParams) -> None:
        self.params = params

    def controller(self) -> KLController:
        from stages.lib.formulas.policy_gradient import KLController

        return KLController(self.params.kl_coefficient)

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A of every token, N x K; and in how many groups all scores are equal, so that they teach nothing."""
        from stages.lib.formulas.policy_gradient import all_equal, group_advantages

        mask_NK = experience.mask
        groups_GS = scores_N.view(-1, self.params.group_size)
        advantages_N = group_advantages(scores_N, self.params.group_size, scale=self.params.scale_by_deviation)
        equal = all_equal(groups_GS).double().mean()
        return advantages_N.unsqueeze(1) * mask_NK, mask_NK * 0, {"groups_without_signal": float(equal)}

    def value_loss(self, values_BK: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is no critic")


def run(ctx: Context, params: GRPOParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, GRPO(params))


STAGE = Stage(
    kind="grpo",
    version=2,
    summary="group relative policy optimization of a causal model: no critic, completions of a prompt compared",
    params=GRPOParams,
    inputs=INPUTS,
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("heldout_reward", "heldout_reward_base", "heldout_reward_deviation_base", "heldout_kl", "heldout_ended"),
    distributed=True,
    estimate=estimate_on_policy,
    check=check_on_policy,
)
