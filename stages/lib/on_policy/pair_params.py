"""What the recipe of a stage says that learns from pairs of its policy's own completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from stages.lib.formulas.bounds import Scale, Weight
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES, PreferenceLoss
from stages.lib.on_policy.params import GroupParams

PairLossName = Literal[
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down", "sppo_hard"
]
"""The losses over pairs that need no more than the two completions and the reference: `fits_pairs_of_rollouts` says which."""

OF_GRADIENTS = "belongs to the losses of single completions"
OF_RANKS = "changes no order of two completions, which is all that is learned from"
UNUSED: Mapping[str, str] = {
    "beta": "is kl_coefficient where a policy learns from its own completions",
    "missing_eos_penalty": "is missing_end_penalty here",
    "policy_loss": "is another stage's: the loss over pairs is `loss`",
    **dict.fromkeys(("loss_aggregation", "clip_ratio", "clip_ratio_high", "dual_clip", "loss_options"), OF_GRADIENTS),
    **dict.fromkeys(("entropy_coefficient", "mismatch_cap"), OF_GRADIENTS),
    "background_rollouts": "has completions of an earlier policy learned from, and a loss over pairs has no weights for that",
    "mask_truncated_completions": f"{OF_GRADIENTS}: missing_end_penalty ranks what was cut off behind what ended",
    **dict.fromkeys(("normalize_rewards", "reward_clip"), OF_RANKS),
}
"""Names that a recipe may not give, and why: what other stages have on the policy's own completions, or TRL by another name."""


def fits_pairs_of_rollouts(loss: PreferenceLoss) -> bool:
    """Whether a loss can be taken over the pairs of a rollout: of each pair by itself, against the reference, without numbers of
    its own.
    """
    alone = not (loss.sorts_pairs or loss.takes_mean_reward or loss.takes_nll)
    return alone and loss.needs_reference and loss.compares and not loss.options


class PairParams(GroupParams):
    """What is learned from the best completion of each prompt against its worst."""

    loss: PairLossName = "sigmoid"
    """What is minimized over pairs, as in the stage dpo. sigmoid: DPO; ipo: squared distance to a fixed margin, on log-probabilities averaged over tokens. The table in stages/README.md says what each is, and when it fits."""
    label_smoothing: Weight = Field(default=0.0, lt=0.5)
    """The share of pairs that are taken to be ranked the wrong way round. Only for the losses that have it: sigmoid, robust, exo_pair."""
    kl_coefficient: Scale = 0.1
    """Beta of the loss over pairs: how dear it is to move away from the reference. Of losses on log-probabilities averaged over tokens it is that of a token."""
    completions_per_prompt: int = Field(default=2, ge=2)
    """Completions of each prompt in a rollout, of which the best and the worst are learned from; a divisor of rollout_batch_size."""
    global_batch_size: int = Field(ge=1)
    """Pairs per optimizer step, over all processes, those of equal scores counted as well; a divisor of rollout_batch_size / completions_per_prompt. While it learns, micro_batch_size counts pairs, too."""
    ptx_batch_size: int | None = Field(default=None, ge=1)
    """Chats per optimizer step, over all processes. null: as many as pairs."""

    @property
    def completions_per_row(self) -> int:
        return 2

    @property
    def rollout_rows(self) -> int:
        return self.rollout_batch_size // self.completions_per_prompt

    @property
    def pair_loss(self) -> PreferenceLoss:
        return PREFERENCE_LOSSES[self.loss]

    @property
    def pair_loss_options(self) -> dict[str, float]:
        """The numbers that the function of the loss takes, by name."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.pair_loss.takes_label_smoothing else {}
        return {"beta": self.kl_coefficient, **smoothing}

    @model_validator(mode="before")
    @classmethod
    def everything_given_is_used(cls, given: Any) -> Any:
        found = [name for name in UNUSED if isinstance(given, Mapping) and name in given]
        defaults = {name: cls.model_fields[name].get_default() for name in found if name in cls.model_fields}
        wrong = [name for name in found if name not in defaults or given[name] != defaults[name]]
        if wrong:
            raise ValueError("; ".join(f"{name} {UNUSED[name]}: remove it" for name in wrong))
        return given

    @model_validator(mode="after")
    def smoothing_fits(self) -> PairParams:
        row = self.pair_loss
        if self.label_smoothing and not row.takes_label_smoothing:
            raise ValueError(
                f"label_smoothing has no effect with the loss {self.loss}: remove it, or take sigmoid, robust or exo_pair"
            )
        if row.needs_label_smoothing and not self.label_smoothing:
            raise ValueError(f"the loss {self.loss} needs label_smoothing: {row.needs_label_smoothing}")
        return self
