"""f-divergences that keep a policy near its reference: what a ratio of probabilities is then worth as a reward.

Direct preference optimization under a divergence D_f instead of the reverse KL has the implicit reward beta f'(t) with
t = pi / pi_ref (Wang et al., 2024, "Beyond reverse KL"). What a prompt adds to it cancels only in differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 80.0
"""exp of more is no number in single precision. Beyond, a reward stays as it is."""


def reverse_kl_reward(ratio_N: Tensor) -> Tensor:
    """log t: f(t) = t log t, whose derivative is log t + 1."""
    return ratio_N


def alpha_reward(ratio_N: Tensor, alpha: float) -> Tensor:
    """(t^(alpha - 1) - 1) / (alpha - 1), with log t given; log t at alpha 1, the reverse KL, and 1 - 1/t at 0, the forward KL."""
    if abs(alpha - 1) < 1e-6:
        return reverse_kl_reward(ratio_N)
    exponent_N = ((alpha - 1) * ratio_N).clamp(max=LARGEST_EXPONENT)
    return exponent_N.expm1() / (alpha - 1)


def forward_kl_reward(ratio_N: Tensor) -> Tensor:
    """1 - 1/t: f(t) = -log t, whose derivative is -1/t, and a constant that cancels."""
    return alpha_reward(ratio_N, 0.0)


def js_reward(ratio_N: Tensor) -> Tensor:
    """log(2 t / (1 + t)): f(t) = t log t - (t + 1) log((t + 1) / 2), of Jensen and Shannon."""
    from torch.nn.functional import logsigmoid

    return math.log(2) + logsigmoid(ratio_N)


@dataclass(frozen=True)
class Divergence:
    """A divergence and what it asks for."""

    reward: Callable[..., Tensor]
    """log(pi / pi_ref) of each answer -> f'(pi / pi_ref)."""
    takes_alpha: bool = False


DIVERGENCES = {
    "reverse_kl": Divergence(reverse_kl_reward),
    "forward_kl": Divergence(forward_kl_reward),
    "js_divergence": Divergence(js_reward),
    "alpha_divergence": Divergence(alpha_reward, takes_alpha=True),
}
"""The divergences that a recipe may name."""


if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]
