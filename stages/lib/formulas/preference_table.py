"""The losses over pairs of answers that a recipe may name, and what each of them needs. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stages.lib.formulas import answer_losses, preference_losses, reference_free_losses
from stages.lib.formulas.loss_options import LossOption

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss over pairs of answers, and what its callers must know of it."""

    function: Callable[..., Tensor]
    """(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, *, what this row says) -> loss_N; without `needs_reference` the
    first two."""
    needs_reference: bool = True
    averages_over_tokens: bool = False
    """Whether the log-probability of an answer is the mean of its tokens', instead of their sum."""
    of_difference: bool = False
    """Whether it depends on the two implicit rewards by their difference alone, so that what a prompt adds cancels."""
    takes_beta: bool = True
    """Whether the function has a parameter `beta`."""
    takes_label_smoothing: bool = False
    """Whether the function has a parameter `label_smoothing`."""
    needs_label_smoothing: str = ""
    """Why it must not be 0, if so."""
    options: Mapping[str, LossOption] = field(default_factory=dict)
    """Parameters of the function that are no other loss's."""
    takes_nll: bool = False
    """Whether the function has a parameter `nll_N`: -log pi(chosen) per token."""
    clones_chosen: bool = False
    """Whether the chosen answer is learned as such, with a part of the loss in which the rejected one plays no role."""
    sorts_pairs: bool = False
    """Whether what a pair loses depends on the pairs beside it: the function is given whole groups of them."""
    takes_mean_reward: bool = False
    """Whether the function has a parameter `mean_reward`: the mean implicit reward of all answers in earlier steps."""
    compares: bool = True
    """Whether the rejected answer plays a part."""

    @property
    def takes_divergence(self) -> bool:
        return self.of_difference and self.needs_reference

    @property
    def takes_length_penalty(self) -> bool:
        """A reward of each token is a part of the implicit reward, of which a mean over tokens has lost the number."""
        return self.takes_divergence and not self.averages_over_tokens

    @property
    def takes_tail_weight(self) -> bool:
        return not self.averages_over_tokens

    @property
    def takes_policy_weight(self) -> bool:
        """A weight of a pair fits what compares its answers, and no other pair's."""
        return self.compares and not self.clones_chosen and not self.sorts_pairs


TEMPERATURE = LossOption(0.05, 1e-3, 1.0, "how far from margin 0 it blends from logistic to exponential")
MARGIN = LossOption(0.5, 0.0, 1e6, "by how much beta x the log-probability per token is to be higher")
CLONING = LossOption(1.0, 0.0, 1e6, "the weight of the chosen answer's negative log-likelihood per token")
SHIFT = LossOption(1.0, 0.0, 1.0, "how much of the mean reward of all earlier steps is subtracted; 0 as in TRL 1.x")


PREFERENCE_LOSSES = {
    # Of the difference of two implicit rewards.
    "sigmoid": PreferenceLoss(preference_losses.sigmoid_loss, of_difference=True, takes_label_smoothing=True),
    "hinge": PreferenceLoss(preference_losses.hinge_loss, of_difference=True),
    "ipo": PreferenceLoss(preference_losses.ipo_loss, of_difference=True, averages_over_tokens=True),
    "sigmoid_norm": PreferenceLoss(preference_losses.sigmoid_norm_loss, of_difference=True, averages_over_tokens=True),
    "robust": PreferenceLoss(
        preference_losses.robust_loss,
        of_difference=True,
        takes_label_smoothing=True,
        needs_label_smoothing="without it robust is sigmoid: the share of wrong labels that you expect, such as 0.1",
    ),
    "exo_pair": PreferenceLoss(
        preference_losses.exo_pair_loss,
        of_difference=True,
        takes_label_smoothing=True,
        needs_label_smoothing="without it the loss is infinite: its authors take 0.001",
    ),
    "discopop": PreferenceLoss(
        preference_losses.discopop_loss, of_difference=True, options={"discopop_temperature": TEMPERATURE}
    ),
    # Of each answer's own.
    "nca_pair": PreferenceLoss(answer_losses.nca_pair_loss),
    "bco_pair": PreferenceLoss(answer_losses.bco_pair_loss, takes_mean_reward=True, options={"reward_shift": SHIFT}),
    "apo_zero": PreferenceLoss(answer_losses.apo_zero_loss),
    "apo_down": PreferenceLoss(answer_losses.apo_down_loss),
    "sppo_hard": PreferenceLoss(answer_losses.sppo_hard_loss),
    # Of the answers of many pairs, sorted.
    "aot": PreferenceLoss(answer_losses.aot_loss, sorts_pairs=True, takes_label_smoothing=True),
    "aot_unpaired": PreferenceLoss(answer_losses.aot_unpaired_loss, sorts_pairs=True, takes_label_smoothing=True),
    # Without a reference.
    "simpo": PreferenceLoss(
        reference_free_losses.simpo_loss,
        needs_reference=False,
        of_difference=True,
        averages_over_tokens=True,
        takes_label_smoothing=True,
        options={"target_margin": MARGIN},
    ),
    "orpo": PreferenceLoss(
        reference_free_losses.orpo_loss, needs_reference=False, averages_over_tokens=True, clones_chosen=True
    ),
    "cpo": PreferenceLoss(
        reference_free_losses.cpo_loss,
        needs_reference=False,
        takes_label_smoothing=True,
        takes_nll=True,
        clones_chosen=True,
        options={"nll_weight": CLONING},
    ),
    "sft": PreferenceLoss(
        reference_free_losses.sft_loss,
        needs_reference=False,
        averages_over_tokens=True,
        takes_beta=False,
        clones_chosen=True,
        compares=False,
    ),
}
"""The losses that a recipe may name. A new one is a function and a row here, and nothing else."""


if TYPE_CHECKING:
    PreferenceLossName = str
else:
    PreferenceLossName = Literal[tuple(PREFERENCE_LOSSES)]
