"""`ppo`: proximal policy optimization from a reward (Ziegler et al., 2019; Stiennon et al., 2020; Ouyang et al., 2022).

    for each rollout
        complete the next prompts with the policy pi                              stages/lib/generating/sampling.py
        score the completions, and judge their tokens by pi, reference and critic
        r_t = - beta log(pi / ref) + [t is the last] score                        `PPO.advantages`, below
        A_t, R_t = GAE(r, V)
        for each minibatch of each pass
            L = max(-A rho, -A clip(rho)) + c max((V - R)^2, (clip(V) - R)^2) / 2   stages/lib/on_policy/learning.py: `loss`
            one step of AdamW on policy and critic
        lead beta to the KL target

The loop is stages/lib/on_policy/loop.py, the formulas are stages/lib/formulas/policy_gradient.py; README.md beside this file explains what
lies in memory and what the logged numbers should look like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.stage import Context, Forecast, Result, accepts
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import LearningRate, Scale
from stages.lib.on_policy.forecast import check_on_policy
from stages.lib.on_policy.params import INPUTS, OnPolicyParams
from stages.lib.on_policy.stage import on_policy_stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.formulas.policy_gradient import KLController
    from stages.lib.formulas.token_losses import Tensors
    from stages.lib.on_policy.experience import Experience


class PPOParams(OnPolicyParams):
    """How the policy is trained, and its critic beside it."""

    epochs_per_rollout: int = Field(default=4, ge=1)
    """Passes over each rollout's completions, in minibatches of global_batch_size, in a new order each time."""
    gamma: float = Field(default=1.0, ge=1e-3, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation: 0 trusts the critic, 1 the rewards."""
    whiten_rewards: bool = False
    """Whether the rewards of tokens are divided by their deviation, over the whole rollout."""
    whiten_advantages: bool = True
    """Whether advantages are shifted to mean 0 and scaled to deviation 1, over the whole rollout."""
    value_coefficient: Scale = 0.1
    """Weight of the critic's loss."""
    value_clip: Scale | None = 0.2
    """How far the critic's value of a token may move in a rollout before its loss counts the farther one. null: freely."""
    value_learning_rate: LearningRate | None = None
    """Learning rate of the critic at its highest. null: that of the policy."""
    kl_target: Scale | None = None
    """Nats per completion to which kl_coefficient is led, from its value at the beginning. null: it stays as it is."""
    kl_horizon: float = Field(default=10_000.0, ge=1, le=1e12)
    """Completions over which it may change by a fifth at most. Above rollout_batch_size / 5, or one rollout could more than double it."""
    publish_critic: bool = True
    """Whether the critic is kept too, in the artifact's folder value/: another run may start from it."""

    @property
    def has_critic(self) -> bool:
        return True

    @model_validator(mode="after")
    def target_can_be_led_to(self) -> PPOParams:
        if self.kl_target is not None and not self.kl_coefficient:
            raise ValueError("kl_target cannot be reached from a kl_coefficient of 0")
        if self.kl_target is None and self.kl_horizon != PPOParams.model_fields["kl_horizon"].default:
            raise ValueError("kl_horizon has no effect without a kl_target")
        if self.kl_target is not None and self.kl_horizon <= self.rollout_batch_size / 5:
            raise ValueError(
                f"kl_horizon {self.kl_horizon:g} must be above rollout_batch_size / 5, which is {self.rollout_batch_size / 5:g}: "
                f"a rollout of {self.rollout_batch_size} completions could more than double kl_coefficient at once. "
                f"Take {self.rollout_batch_size} or more, or smaller rollouts"
            )
        return self


def check(forecast: Forecast) -> list[Problem]:
    problems = check_on_policy(forecast)
    if "value" in forecast.inputs and forecast.params.adapter is not None:
        what = "is not used under an adapter, where the critic shares the policy's backbone"
        problems.append(Problem("inputs.value", what, "Remove it."))
    return problems


def run(ctx: Context, params: PPOParams) -> Result:
    from stages.lib.on_policy.setup import run_on_policy

    return run_on_policy(ctx, params, PPO(params), params.value_learning_rate)


STAGE = on_policy_stage(
    kind="ppo",
    version=5,
    summary="proximal policy optimization of a causal model, from a reward model or programmatic rewards",
    params=PPOParams,
    inputs={**INPUTS, "value": accepts(Kind.REWARD_MODEL, optional=True)},
    run=run,
    check=check,
)


class PPO:
    """Rewards per token with the KL penalty in them, and generalized advantages of a critic."""

    kl_in_loss = False

    def __init__(self, params: PPOParams) -> None:
        self.params = params
        self.value_coefficient = params.value_coefficient

    def controller(self) -> KLController:
        from stages.lib.formulas.policy_gradient import KLController

        return KLController(self.params.kl_coefficient, self.params.kl_target, self.params.kl_horizon)

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A_t and R_t of every token, N x K, and how well the critic foresaw them.

        Where all scores are equal, A_t is that of the KL penalty alone, as large as it is; the critic learns as ever.
        """
        from stages.lib.formulas import policy_gradient as pg

        mask_NK, values_NK = experience.mask, experience.padded("values")
        logp_NK, ref_NK = experience.padded("logprobs"), experience.padded("ref_logprobs")
        kl_NK = pg.KL_ESTIMATORS[self.params.kl_estimator](logp_NK, ref_NK) * mask_NK
        rewards_NK = pg.token_rewards(scores_N, kl_NK, mask_NK, kl_coefficient=kl_coefficient)
        if self.params.whiten_rewards:
            rewards_NK = pg.whiten(rewards_NK, mask_NK, shift_mean=False)
        advantages_NK, returns_NK = pg.generalized_advantages(
            rewards_NK, values_NK, mask_NK, gamma=self.params.gamma, lam=self.params.gae_lambda
        )
        logged = {
            "explained_variance": float(pg.explained_variance(values_NK, returns_NK, mask_NK)),
            "value_mean": float(pg.masked_mean(values_NK, mask_NK)),
            "return_mean": float(pg.masked_mean(returns_NK, mask_NK)),
            "return_deviation": float(pg.masked_variance(returns_NK, mask_NK).sqrt()),
        }
        if bool(pg.all_equal(scores_N.view(1, -1))):
            # What is left of them says nothing about the completions: whitened, it would move the policy all the same.
            penalties_NK = pg.token_rewards(0 * scores_N, kl_NK, mask_NK, kl_coefficient=kl_coefficient)
            advantages_NK, _ = pg.generalized_advantages(
                penalties_NK, 0 * values_NK, mask_NK, gamma=self.params.gamma, lam=self.params.gae_lambda
            )
        elif self.params.whiten_advantages:
            advantages_NK = pg.whiten(advantages_NK, mask_NK)
        return advantages_NK, returns_NK, logged

    def value_loss(self, values_BK: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        from stages.lib.formulas.policy_gradient import clipped_value_loss

        return clipped_value_loss(values_BK, batch["values"], batch["returns"], clip=self.params.value_clip)
