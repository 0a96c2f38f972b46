"""Losses of single scores: of answers that are good or bad, or rated, and of steps that are right or wrong; the table of
those that a recipe may name for ratings; and how scores of several heads, attributes or steps become one.

N: answers, H: heads, A: attributes, S: steps of an answer.

Imports torch only where it computes, because `slipway plan` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def binary_loss(score: Tensor, good: Tensor) -> Tensor:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s), elementwise, where y is 1 for what is good and 0 for what is bad.

    Of answers that verifiers judge: Cobbe et al. (2021); of steps: Lightman et al. (2023), Wang et al. (2024, Math-Shepherd),
    equation 3.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(score, good.to(score.dtype), reduction="none")


def squared_loss(score: Tensor, rating: Tensor) -> Tensor:
    """(s - y)^2, elementwise: Wang et al. (2023, HelpSteer), Wang et al. (2024, ArmoRM), equation 1."""
    return (score - rating.to(score.dtype)).square()


def ordinal_loss(score: Tensor, rating: Tensor, *, levels: Sequence[float]) -> Tensor:
    """The sum over cuts c between neighbouring levels of -log sigmoid(s - c) where y > c, and of -log sigmoid(c - s) elsewhere.

    All thresholds, logistic: Rennie and Srebro (2005), equation 13, with each cut held in the middle between its two levels
    instead of learned, so that a score is in the units of the ratings, and the head needs nothing that plain
    transformers would not load. A rating of two levels off costs more than one of one; unlike the square it grows linearly.
    """
    from torch import tensor
    from torch.nn.functional import logsigmoid

    cuts = tensor([(low + high) / 2 for low, high in pairwise(levels)], dtype=score.dtype)
    cuts = cuts.to(score.device)
    sign = (rating[..., None].to(score.dtype) > cuts).to(score.dtype) * 2 - 1
    return -logsigmoid(sign * (score[..., None] - cuts)).sum(dim=-1)


@dataclass(frozen=True)
class RatingLoss:
    """A loss of a score and a rating, and what its callers must know of it."""

    function: Callable[..., Tensor]
    """(score, rating, and levels if it needs those) -> loss, elementwise."""
    needs_levels: bool = False
    """Whether it must know which ratings there are."""


RATING_LOSSES = {
    "squared": RatingLoss(squared_loss),
    "ordinal": RatingLoss(ordinal_loss, needs_levels=True),
}
"""The losses that a recipe may name for ratings. A new one is a function and a row here, and nothing else."""


if TYPE_CHECKING:
    RatingLossName = str
else:
    RatingLossName = Literal[tuple(RATING_LOSSES)]


# How several numbers become one score


def weighted_score(output_NHA: Tensor, weight_A: Tensor) -> Tensor:
    """N x H: the sum over attributes of weight x output, of each head."""
    return output_NHA @ weight_A.to(output_NHA)


def cautious_score(score_NH: Tensor, uncertainty_penalty: float) -> Tensor:
    """N: mean over heads - penalty x standard deviation over heads, which divides by H.

    A lower bound of the score, against answers that only some heads like: after Coste et al. (2024), equation 4, who take
    the variance.
    """
    mean_N = score_NH.mean(dim=1)
    return mean_N - uncertainty_penalty * score_NH.std(dim=1, correction=0) if uncertainty_penalty else mean_N


def score_of_steps(right_S: Tensor, how: str) -> Tensor:
    """One number of the probabilities that the steps of an answer are right: the least (`min`; Wang et al., 2024), their
    `product` (Lightman et al., 2023), or that of the `last` step (Snell et al., 2024). There must be a step.
    """
    return {"min": right_S.min, "product": right_S.prod, "last": lambda: right_S[-1]}[how]()
