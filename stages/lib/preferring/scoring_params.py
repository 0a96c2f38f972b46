"""What a recipe says of a reward model, and whether the input that it learns from uses all of that. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Container
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.errors import Problem
from pipeline.stage import Forecast
from stages.lib.formulas.bounds import SignedWeight, Weight
from stages.lib.formulas.reward_losses import RATING_LOSSES, RatingLoss, RatingLossName
from stages.lib.preferring.params import PreferenceParams
from stages.lib.preferring.reward_reading import RewardReading, StepsReading, StepsScore

REWARD_ROLES = ("preferences", "unpaired_preferences", "ratings", "step_labels")
"""The inputs of which one has what is learned: pairs, answers that are good or bad, ratings, or steps that are right or wrong."""

USED_BY = {
    **dict.fromkeys(("margin", "margin_from", "label_smoothing", "center_rewards_coefficient"), ("preferences",)),
    **dict.fromkeys(("attributes", "rating_loss", "rating_levels"), ("ratings",)),
    **dict.fromkeys(("step_separator", "answer_score"), ("step_labels",)),
    **dict.fromkeys(("heads", "bootstrap"), ("preferences", "unpaired_preferences", "ratings")),
}
"""Param -> the inputs that use it."""


class ScoringParams(PreferenceParams):
    """What a model learns that scores answers."""

    margin: Weight = 0.0
    """By how much the chosen answer's score should exceed the rejected one's before the loss counts the pair as even. Only with margin_from: constant."""
    margin_from: Literal["constant", "column"] = "constant"
    """Where margins come from. constant: every pair has `margin`; column: each row of the preferences says its own as `margin`, a number of at least 0, and one that says none is an error."""
    label_smoothing: Weight = Field(default=0.0, lt=0.5)
    """The share of pairs that are taken to be labelled the wrong way round: it keeps scores from drifting apart on pairs that are always told apart."""
    center_rewards_coefficient: Weight = 0.0
    """Weight of the squared sum of a pair's two scores in the loss, which holds scores around 0 (0.01 is usual). Without it only differences of scores mean something."""
    attributes: dict[str, SignedWeight] = Field(default={}, exclude_if=lambda attributes: not attributes)
    """What is learned of the input ratings: the name of each attribute and its weight in the score, as {helpfulness: 0.65, correctness: 0.8, verbosity: -0.4}. An attribute with the weight 0 is learned and counts for nothing. Other attributes of the rows are not read; a rating that a row lacks is left out of the loss."""
    rating_loss: RatingLossName = Field(default="squared", exclude_if=lambda name: name == "squared")
    """What is minimized of ratings. squared: (score - rating)^2; ordinal: a logistic loss at each border between two neighbouring rating_levels, which a few odd ratings move less."""
    rating_levels: list[float] | None = Field(default=None, min_length=2, exclude_if=lambda levels: levels is None)
    """The ratings that there are, in rising order, as [0, 1, 2, 3, 4]. Only with rating_loss: ordinal, which must know them."""
    heads: int = Field(default=1, ge=1, le=64, exclude_if=lambda heads: heads == 1)
    """Heads on one backbone, each begun with other random numbers: an ensemble. The score is their mean, less as many of their standard deviations as `uncertainty_penalty` of the stage that reads it says."""
    bootstrap: bool = Field(default=False, exclude_if=lambda asked: not asked)
    """Whether each head learns from a sample of its own: each row counts for it as often as a draw of a Poisson variable of mean 1 says, which depends on the seed, the row and the head. Only with several heads."""
    step_separator: str = Field(default="\n\n", min_length=1, exclude_if=lambda text: text == "\n\n")
    """The text that stands behind each step where steps are judged (input step_labels), and at which whole answers are taken apart into steps."""
    answer_score: StepsScore = Field(default="min", exclude_if=lambda how: how == "min")
    """What the score of a whole answer is where steps are judged: the least of its steps' probabilities of being right, their product, or that of the last one."""

    def measures(self) -> tuple[str, ...]:
        names = ["accuracy", "accuracy_of_*", "loss", "margin", "calibration_error", "score", "score_*"]
        names += ["auc", "mse", "mse_of_*", "correlation", "correlation_of_*", "head_deviation"]
        names += ["answer_accuracy", "answer_auc"]
        return tuple(f"heldout_{name}" for name in names)

    @property
    def loss_of_ratings(self) -> RatingLoss:
        return RATING_LOSSES[self.rating_loss]

    def reading_of(self, role: str) -> RewardReading | StepsReading:
        """How the model is read that learns from this input."""
        if role == "step_labels":
            return StepsReading(self.step_separator, self.answer_score)
        if role == "ratings":
            return RewardReading(self.heads, tuple(self.attributes), tuple(self.attributes.values()))
        return RewardReading(self.heads)

    @field_validator("attributes")
    @classmethod
    def attributes_in_one_order(cls, attributes: dict[str, float]) -> dict[str, float]:
        """By name: the order in which they are written is no part of what is asked for, and the outputs have one."""
        if attributes and not any(attributes.values()):
            raise ValueError("all weights are 0, so that the score would always be 0: give one of them a weight")
        if len({metric_name(name) for name in attributes}) < len(attributes):
            raise ValueError(
                "two of the names are the same as parts of a metric's name: rename one of them in the data"
            )
        return {name: attributes[name] for name in sorted(attributes)}

    @model_validator(mode="after")
    def margin_is_used(self) -> ScoringParams:
        if self.margin and self.margin_from == "column":
            raise ValueError("margin has no effect with margin_from: column: remove it, or take constant")
        return self

    @model_validator(mode="after")
    def levels_are_used(self) -> ScoringParams:
        levels = self.rating_levels
        if self.loss_of_ratings.needs_levels and levels is None:
            raise ValueError(f"rating_loss {self.rating_loss} needs rating_levels, such as [0, 1, 2, 3, 4]")
        if levels is not None and not self.loss_of_ratings.needs_levels:
            raise ValueError(
                f"rating_levels have no effect with rating_loss {self.rating_loss}: remove them, or take ordinal"
            )
        if levels is not None and any(not low < high for low, high in pairwise(levels)):
            raise ValueError(f"rating_levels must rise, and are {levels}")
        return self

    @model_validator(mode="after")
    def bootstrap_has_heads(self) -> ScoringParams:
        if self.bootstrap and self.heads == 1:
            raise ValueError(
                "bootstrap gives each of several heads rows of its own, and there is 1: raise heads, or remove it"
            )
        return self


def metric_name(name: str) -> str:
    """A name as it stands within that of a metric."""
    return re.sub(r"[^0-9a-zA-Z]+", "_", name)


def reward_role(inputs: Container[str]) -> str:
    """The input that has what is learned."""
    return next(role for role in REWARD_ROLES if role in inputs)


def reward_input_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong with the inputs of which one has what is learned, and with params that it does not use."""
    given = [role for role in REWARD_ROLES if role in forecast.inputs]
    if not given:
        hint = f"Add one of {', '.join(REWARD_ROLES)}."
        return [Problem("inputs", "have nothing to learn from", hint)]
    if len(given) > 1:
        hint = "Keep one: a training reads one mixed data set, of pairs, single answers, ratings or steps."
        return [Problem("inputs", f"have {' and '.join(given)}", hint)]
    (role,), params = given, forecast.params
    problems = [
        Problem(f"params.{name}", f"has no effect on the input {role}", f"Remove it; it is for {', '.join(roles)}.")
        for name, roles in USED_BY.items()
        if role not in roles and getattr(params, name) != type(params).model_fields[name].default
    ]
    if role == "ratings" and not params.attributes:
        hint = "Name what is learned and its weight, as {helpfulness: 0.7, correctness: 0.3}; of one number a row {rating: 1}."
        problems.append(Problem("params.attributes", "is missing, and the input ratings has attributes", hint))
    return problems
