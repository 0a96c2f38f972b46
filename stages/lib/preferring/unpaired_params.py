"""What a recipe says of a loss over single answers. Imports no torch."""

from __future__ import annotations

from pydantic import model_validator

from pipeline.errors import Problem
from pipeline.stage import Forecast
from stages.lib.formulas.bounds import Scale, Weight
from stages.lib.formulas.unpaired_losses import UNPAIRED_LOSSES, UnpairedLoss, UnpairedLossName
from stages.lib.preferring.params import PolicyParams, PreferenceParams

ROLES = ("unpaired_preferences", "preferences")
"""The inputs of which one has the answers: single ones, or pairs, whose two answers are taken apart."""


class UnpairedParams(PreferenceParams, PolicyParams):
    """What is minimized over single answers."""

    loss: UnpairedLossName = "kto"
    """What is minimized. kto: desirable answers are to gain more over the reference than answers to other prompts do, undesirable ones less; apo_zero_unpaired: the same with 0 in the place of what those gain, for desirable answers that are better than what the model says itself. The table in stages/README.md says what each is."""
    beta: Scale = 0.1
    """How dear it is to move away from the reference: the higher, the nearer the policy stays."""
    desirable_weight: Weight = 1.0
    """What a desirable answer counts. Where there are fewer of them, raise it, so that it times their number is 1 to 4/3 times what it is of the others."""
    undesirable_weight: Weight = 1.0
    """What an undesirable answer counts."""

    @property
    def unpaired_loss(self) -> UnpairedLoss:
        return UNPAIRED_LOSSES[self.loss]

    def measures(self) -> tuple[str, ...]:
        names = ["loss", "accuracy", "accuracy_of_*", "auc", "margin"]
        names += ["desirable_logprob_change", "undesirable_logprob_change"]
        return tuple(f"heldout_{name}" for name in names + ["kl"] * self.unpaired_loss.needs_kl)

    @model_validator(mode="after")
    def something_counts(self) -> UnpairedParams:
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0, so that nothing is learned: raise one"
            )
        return self

    @model_validator(mode="after")
    def answers_have_others_beside_them(self) -> UnpairedParams:
        if self.unpaired_loss.needs_kl and self.global_batch_size < 2:
            raise ValueError(
                f"global_batch_size is 1, and the loss {self.loss} compares each answer with the others of its step: take a"
                " larger one, or the loss apo_zero_unpaired"
            )
        return self


def input_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong with the inputs that may have the answers: one of them must be there, and not both."""
    given = [role for role in ROLES if role in forecast.inputs]
    if len(given) == 1:
        return []
    if not given:
        hint = "Add unpaired_preferences, or preferences, whose pairs are taken apart."
        return [Problem("inputs", "have no answers to learn from", hint)]
    hint = "Remove one of them: a training reads one mixed data set, of single answers or of pairs."
    return [Problem("inputs", f"have both {' and '.join(given)}", hint)]


def num_answers(forecast: Forecast) -> int | None:
    """The training answers, as far as they are known: a pair has two."""
    for role, answers in zip(ROLES, (1, 2), strict=True):
        if role in forecast.inputs:
            rows = forecast.inputs[role].train_rows
            return None if rows is None else answers * rows
    return None
