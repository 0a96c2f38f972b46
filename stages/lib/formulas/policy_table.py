"""The losses of a policy that a recipe may name, what each of them needs, and how tokens are added up. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stages.lib.formulas import policy_losses
from stages.lib.formulas.loss_options import LossOption

if TYPE_CHECKING:
    from torch import Tensor

AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token_mean": policy_losses.token_mean,
    "seq_mean_token_mean": policy_losses.seq_mean_token_mean,
    "seq_mean_token_sum": policy_losses.seq_mean_token_sum,
    "seq_mean_token_sum_norm": policy_losses.seq_mean_token_sum_norm,
}
"""(lengths_B1, *, tokens, completions, max_new_tokens) -> what each token of a completion counts, B x 1. Names are verl's."""


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of the policy on completions, and what its callers must know of it."""

    function: Callable[..., tuple[Tensor, Tensor]]
    """(logp_BK, old_logp_BK, advantages_BK, mask_BK, *, what this row says) -> loss and clipped share, B x K."""
    aggregation: str = "token_mean"
    """How its authors add up tokens: a key of `AGGREGATIONS`."""
    takes_clip_ratio: bool = True
    """Whether the function has a parameter `clip_low`: the bound below."""
    takes_clip_ratio_high: bool = True
    """Whether the function has a parameter `clip_high`: the bound above."""
    takes_dual_clip: bool = True
    """Whether the function has a parameter `dual_clip`."""
    needs_clip_ratio: str = ""
    """Why a recipe must say the bound below itself, if so."""
    needs_clip_ratio_high: str = ""
    """Why a recipe must say the bound above itself, if so."""
    options: Mapping[str, LossOption] = field(default_factory=dict)
    """Parameters of the function that are no other loss's."""


OF_SEQUENCES = (
    "ratios of whole completions lie near 1, and 0.2 clips none of them: its authors take 0.0003, and 0.0004 above"
)
OF_WEIGHTS = "no importance weight is above 1 + it: 4.0 is that of ScaleRL"
GATE = "how fast the gate closes for tokens of {} advantage"


POLICY_LOSSES = {
    "ppo_clip": PolicyLoss(policy_losses.ppo_clip_loss),
    "gspo": PolicyLoss(policy_losses.gspo_loss, aggregation="seq_mean_token_mean", needs_clip_ratio=OF_SEQUENCES),
    "gspo_token": PolicyLoss(
        policy_losses.gspo_token_loss, aggregation="seq_mean_token_mean", needs_clip_ratio=OF_SEQUENCES
    ),
    "cispo": PolicyLoss(
        policy_losses.cispo_loss,
        takes_clip_ratio=False,
        takes_dual_clip=False,
        needs_clip_ratio_high=OF_WEIGHTS,
    ),
    "sapo": PolicyLoss(
        policy_losses.sapo_loss,
        aggregation="seq_mean_token_mean",
        takes_clip_ratio=False,
        takes_clip_ratio_high=False,
        takes_dual_clip=False,
        options={
            "sapo_temperature_pos": LossOption(1.0, 1e-3, 1e3, GATE.format("positive")),
            "sapo_temperature_neg": LossOption(1.05, 1e-3, 1e3, GATE.format("no positive")),
        },
    ),
}
"""The losses that a recipe may name. A new one is a function and a row here, and nothing else."""


if TYPE_CHECKING:
    PolicyLossName = str
    AggregationName = str
else:
    PolicyLossName = Literal[tuple(POLICY_LOSSES)]
    AggregationName = Literal[tuple(AGGREGATIONS)]
