"""Losses over single answers that are desirable or not, and the table of those that a recipe may name.

N: answers. `ratio_N` is log(pi / pi_ref) of each answer given its prompt, summed over its tokens, and `desirable_N` whether
it is desirable. Every function returns one loss an answer, from 0 to 1.

Imports torch only where it computes, because `slipway plan` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def kto_loss(ratio_N: Tensor, desirable_N: Tensor, *, beta: float, kl: float) -> Tensor:
    """1 - sigmoid(beta (x - z)) of desirable answers, 1 - sigmoid(beta (z - x)) of others, with x the log-ratio.

    KTO (Ethayarajh et al., 2024), equation 7, without its weights. z is `kl`, the reference point, which is no
    function of pi: max(0, the mean log-ratio of answers given prompts that are not theirs), an estimate of KL(pi || pi_ref).
    """
    from torch import where

    return (where(desirable_N, -1.0, 1.0) * beta * (ratio_N - kl)).sigmoid()


def apo_zero_unpaired_loss(ratio_N: Tensor, desirable_N: Tensor, *, beta: float) -> Tensor:
    """1 - sigmoid(beta x) of desirable answers, sigmoid(beta x) of others, with x the log-ratio: KTO with z = 0.

    APO-zero (D'Oosterlinck et al., 2024), equation 7, of single answers: for desirable ones that are better than the model's
    own, which are to become likelier whatever else does.
    """
    return kto_loss(ratio_N, desirable_N, beta=beta, kl=0.0)


@dataclass(frozen=True)
class UnpairedLoss:
    """A loss over single answers, and what its callers must know of it."""

    function: Callable[..., Tensor]
    """(ratio_N, desirable_N, *, beta, and kl if it needs that) -> loss_N."""
    needs_kl: bool = False
    """Whether the function has a parameter `kl`: what answers gain given prompts that are not theirs."""


UNPAIRED_LOSSES = {
    "kto": UnpairedLoss(kto_loss, needs_kl=True),
    "apo_zero_unpaired": UnpairedLoss(apo_zero_unpaired_loss),
}
"""The losses that a recipe may name. A new one is a function and a row here, and nothing else."""


if TYPE_CHECKING:
    UnpairedLossName = str
else:
    UnpairedLossName = Literal[tuple(UNPAIRED_LOSSES)]
