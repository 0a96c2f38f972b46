"""What the stages have in common that train a policy on its own completions: their declaration, and groups without a critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.errors import Problem
from pipeline.stage import Context, Forecast, Input, Result, Stage
from stages.lib.on_policy.forecast import check_on_policy, estimate_on_policy
from stages.lib.on_policy.params import INPUTS, GroupParams, OnPolicyParams
from stages.lib.text.template_date import on_template_date
from stages.lib.training.params import causal_lm_or_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from stages.lib.formulas.policy_gradient import KLController
    from stages.lib.formulas.token_losses import Tensors

Chosen = TypeVar("Chosen", bound=GroupParams)


def on_policy_stage(
    *,
    kind: str,
    version: int,
    summary: str,
    params: type[OnPolicyParams],
    run: Callable[[Context, Any], Result],
    inputs: Mapping[str, Input] = INPUTS,
    check: Callable[[Forecast], list[Problem]] = check_on_policy,
    headline: tuple[str, ...] = (),
) -> Stage:
    """A stage that makes a causal model of a causal model, or an adapter of it, by what its completions are worth.

    `headline`: metrics of its own to show beside those that all have.
    """
    return Stage(
        kind=kind,
        version=version,
        summary=summary,
        params=params,
        inputs=inputs,
        output=causal_lm_or_adapter,
        run=on_template_date(run),
        headline=(
            "heldout_reward",
            "heldout_reward_base",
            "heldout_reward_deviation_base",
            "heldout_kl",
            "heldout_ended",
            *headline,
        ),
        distributed=True,
        estimate=estimate_on_policy,
        check=check,
    )


class GroupAlgorithm(Generic[Chosen]):
    """What algorithms share that take the other completions of a prompt as the baseline: there is no critic.

    With its `advantages` each is an `Algorithm` of parts.py.
    """

    value_coefficient = 0.0

    def __init__(self, params: Chosen) -> None:
        self.params = params

    def controller(self) -> KLController:
        """A coefficient that stays as it is."""
        from stages.lib.formulas.policy_gradient import KLController

        return KLController(self.params.kl_coefficient)

    def value_loss(self, values_BK: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is no critic")
