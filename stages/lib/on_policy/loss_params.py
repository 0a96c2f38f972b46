"""What a recipe says of the policy's loss on its completions, and whether that loss uses all of it. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from stages.lib.formulas.bounds import Scale
from stages.lib.formulas.loss_options import require_option
from stages.lib.formulas.policy_table import POLICY_LOSSES, AggregationName, PolicyLoss, PolicyLossName
from stages.lib.training.params import OptimizerParams


class PolicyLossParams(OptimizerParams):
    """What is minimized over the tokens of completions."""

    policy_loss: PolicyLossName = Field(default="ppo_clip", exclude_if=lambda name: name == "ppo_clip")
    """What is minimized. ppo_clip: the clipped ratio of each token (PPO, GRPO, DAPO); gspo: that of whole completions; gspo_token: the same, with a gradient for each token's own advantage; cispo: REINFORCE with bounded importance weights; sapo: a soft gate instead of a clip. The table in stages/README.md says when which fits."""
    loss_aggregation: AggregationName | None = Field(default=None, exclude_if=lambda name: name is None)
    """How the losses of tokens become one number. token_mean: the mean over all tokens of the step (DAPO); seq_mean_token_mean: over the tokens of each completion, then over completions; seq_mean_token_sum_norm: sums of completions, divided by max_new_tokens, then their mean (Dr. GRPO); seq_mean_token_sum: the same without that divisor. null: as the authors of policy_loss have it."""
    clip_ratio: float = Field(default=0.2, ge=1e-6, lt=1)
    """Epsilon: beyond 1 +- this ratio to the policy that wrote it, a token teaches nothing more."""
    clip_ratio_high: Scale | None = None
    """Another epsilon for the upper side. null: the same."""
    dual_clip: Scale | None = Field(default=None, exclude_if=lambda ratio: ratio is None)
    """Beyond this ratio a token with a negative advantage teaches nothing more either, such as 3; above 1 + clip_ratio_high. null: without a bound."""
    loss_options: dict[str, float] = Field(default={}, exclude_if=lambda options: not options)
    """Numbers that only one policy_loss has: sapo_temperature_pos (1) and sapo_temperature_neg (1.05) of sapo. What is not given is as its authors have it."""
    mask_truncated_completions: bool = Field(default=False, exclude_if=lambda masked: not masked)
    """Whether completions that were cut off at max_new_tokens are left out of the loss (DAPO's overlong filtering). They still count in the mean and deviation of their group."""

    @property
    def loss_row(self) -> PolicyLoss:
        return POLICY_LOSSES[self.policy_loss]

    @property
    def aggregation(self) -> str:
        """How the losses of tokens become one number: a key of `AGGREGATIONS`."""
        return self.loss_aggregation or self.loss_row.aggregation

    @property
    def policy_loss_options(self) -> dict[str, float | None]:
        """The numbers that the function of the loss takes, by name."""
        row = self.loss_row
        options: dict[str, float | None] = {
            key: self.loss_options.get(key, option.default) for key, option in row.options.items()
        }
        if row.takes_clip_ratio:
            options["clip_low"] = self.clip_ratio
        if row.takes_clip_ratio_high:
            options["clip_high"] = self.clip_ratio_high or self.clip_ratio
        if row.takes_dual_clip:
            options["dual_clip"] = self.dual_clip
        return options

    @model_validator(mode="after")
    def options_are_used(self) -> PolicyLossParams:
        row, name = self.loss_row, self.policy_loss
        self.require_used("clip_ratio", self.clip_ratio != field_default("clip_ratio"), "takes_clip_ratio")
        self.require_used("clip_ratio_high", self.clip_ratio_high is not None, "takes_clip_ratio_high")
        self.require_used("dual_clip", self.dual_clip is not None, "takes_dual_clip")
        for key, value in self.loss_options.items():
            require_option(key, value, row.options, f"the loss {name}", POLICY_LOSSES)
        if row.needs_clip_ratio and "clip_ratio" not in self.model_fields_set:
            raise ValueError(f"the loss {name} needs clip_ratio: {row.needs_clip_ratio}")
        if row.needs_clip_ratio_high and self.clip_ratio_high is None:
            raise ValueError(f"the loss {name} needs clip_ratio_high: {row.needs_clip_ratio_high}")
        return self

    @model_validator(mode="after")
    def dual_clip_lies_beyond(self) -> PolicyLossParams:
        most = 1 + (self.clip_ratio_high or self.clip_ratio)
        if self.dual_clip is not None and self.dual_clip <= most:
            raise ValueError(
                f"dual_clip {self.dual_clip:g} must be above 1 + clip_ratio_high, which is {most:g}:"
                f" take {'3' if most < 3 else 'more than that'}, or remove it"
            )
        return self

    def require_used(self, param: str, given: bool, property_: str) -> None:
        """Raises `ValueError` if `param` is given and the loss does not use it."""
        if given and not getattr(self.loss_row, property_):
            fit = [name for name, loss in POLICY_LOSSES.items() if getattr(loss, property_)]
            raise ValueError(
                f"{param} has no effect with the loss {self.policy_loss}: remove it, or take {', '.join(fit[:-1])} or {fit[-1]}"
            )


def field_default(name: str) -> Any:
    return PolicyLossParams.model_fields[name].default
