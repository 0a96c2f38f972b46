"""What a recipe says of a loss over pairs, and whether the losses that it names use all of that. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import Problem, RecipeError, did_you_mean, shown
from pipeline.stage import Forecast
from stages.lib.formulas.bounds import Scale, Weight
from stages.lib.formulas.divergences import DIVERGENCES, DivergenceName
from stages.lib.formulas.loss_options import require_option
from stages.lib.formulas.preference_table import PREFERENCE_LOSSES, PreferenceLoss, PreferenceLossName
from stages.lib.preferring.params import PreferenceParams
from stages.lib.training.params import derive_batch


def names_losses(value: Any) -> Any:
    """The value, if it is the name of a loss, or names of losses with weights. Else raises `ValueError` in our words."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("names no loss: write one, or a weight for each of several")
        for name, weight in value.items():
            require_loss_name(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"{name}: the weight must be a number, not {shown(weight)}")
            if not 1e-8 <= weight <= 1e6:
                raise ValueError(f"{name}: the weight must be from 1e-08 to 1e+06, not {weight!r}; leave out what is 0")
        # The order in which they are written is no part of what is asked for, and sums of rounded numbers have one.
        return {name: float(value[name]) for name in PREFERENCE_LOSSES if name in value}
    if not isinstance(value, str):
        raise ValueError(f"must be the name of a loss, or a mapping of names to weights, not {shown(value)}")
    require_loss_name(value)
    return value


def require_loss_name(name: Any) -> None:
    if name not in PREFERENCE_LOSSES:
        hint = did_you_mean(str(name), list(PREFERENCE_LOSSES))
        raise ValueError(f"there is no loss {shown(name)} ({hint})")


LossChoice = Annotated[PreferenceLossName | dict[str, float], BeforeValidator(names_losses)]
"""The name of a loss, or several names with the weight of each."""


class PairLossParams(PreferenceParams):
    """What is minimized over pairs of answers."""

    loss: LossChoice = "sigmoid"
    """What is minimized: the name of a loss, or a mapping of names to weights, whose weighted sum it then is, as {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}. sigmoid: DPO; hinge: max(0, 1 - margin); ipo: squared distance to a fixed margin, on log-probabilities averaged over tokens, which does not run away on pairs that are always preferred; sft: a term that holds up the chosen answer. simpo, orpo, cpo and sft need no reference. The table in stages/README.md says what each is, and when it fits."""
    beta: Scale = 0.1
    """How dear it is to move away from the reference: the higher, the nearer the policy stays. Without a reference, what log-probabilities are multiplied by (simpo: 2 to 2.5; cpo: 0.1), and of orpo the weight of its odds ratio. Of losses on log-probabilities averaged over tokens it is that of a token (sigmoid_norm: 5)."""
    label_smoothing: Weight = Field(default=0.0, lt=0.5)
    """The share of pairs that are taken to be labelled the wrong way round. Only for the losses that have it; most are then conservative, as sigmoid is, and robust is unbiased instead."""
    loss_options: dict[str, float] = Field(default={}, exclude_if=lambda options: not options)
    """Numbers that only one loss has: discopop_temperature (discopop, 0.05), target_margin (simpo, 0.5), nll_weight (cpo, 1), reward_shift (bco_pair, 1). What is not given is as its authors have it."""
    f_divergence: DivergenceName | None = Field(default=None, exclude_if=lambda name: name is None)
    """What keeps the policy near the reference, for losses of the difference of two implicit rewards: forward_kl covers all that the reference says, js_divergence lies between, alpha_divergence is as f_divergence_alpha says. null: reverse_kl."""
    f_divergence_alpha: float | None = Field(default=None, ge=-10, le=10, exclude_if=lambda alpha: alpha is None)
    """Of alpha_divergence: 1 is the reverse KL, 0 the forward KL. null: 0.5."""
    policy_weighting: bool = Field(default=False, exclude_if=lambda weighted: not weighted)
    """Whether a pair counts the more, the likelier the policy itself would give both its answers (WPO), as if pairs had been drawn from it. Terms that learn the chosen answer as such are not weighted."""
    tail_weight: float | None = Field(default=None, ge=0, lt=1, exclude_if=lambda weight: weight is None)
    """What log-probabilities of tokens count beyond the length of the shorter answer of the pair (LD-DPO's alpha), under policy and reference alike, and in all metrics. null: as much as all others."""
    length_penalty: Weight = Field(default=0.0, exclude_if=lambda penalty: not penalty)
    """What each token of an answer is worth in its implicit reward (R-DPO's alpha), in the loss alone: a longer chosen answer then counts as preferred without any change, and its length is not learned."""
    group_pairs: int | None = Field(default=None, ge=2, exclude_if=lambda pairs: pairs is None)
    """Pairs that aot and aot_unpaired sort together: so many successive ones. micro_batch_size must be a multiple of it, so that no group is split. null: all pairs of a step, which then must be one micro batch of one process."""

    def measures(self) -> tuple[str, ...]:
        names = ["accuracy", "accuracy_of_*", "accuracy_plain", "margin", "loss"]
        if self.needs_reference:
            names += ["chosen_logprob_change", "rejected_logprob_change"]
        else:
            names += ["accuracy_per_token", "chosen_logprob", "rejected_logprob"]
        return tuple(f"heldout_{name}" for name in names)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss, in the order of the table."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def losses(self) -> dict[str, PreferenceLoss]:
        """The row of each loss, in the order of the table."""
        return {name: PREFERENCE_LOSSES[name] for name in self.loss_weights}

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses.values())

    @property
    def sorted_pairs(self) -> int | None:
        """How many pairs are sorted together; None where nothing is sorted."""
        sorts = any(loss.sorts_pairs for loss in self.losses.values())
        return (self.group_pairs or self.global_batch_size) if sorts else None

    def options_of(self, name: str) -> dict[str, float]:
        """The numbers that the function of a loss takes, by name."""
        loss = PREFERENCE_LOSSES[name]
        options = {key: self.loss_options.get(key, option.default) for key, option in loss.options.items()}
        if loss.takes_beta:
            options["beta"] = self.beta
        if loss.takes_label_smoothing:
            options["label_smoothing"] = self.label_smoothing
        return options

    @model_validator(mode="after")
    def options_fit(self) -> PairLossParams:
        known = {key: option for loss in self.losses.values() for key, option in loss.options.items()}
        for key, value in self.loss_options.items():
            require_option(key, value, known, named(self.losses), PREFERENCE_LOSSES)
        return self

    @model_validator(mode="after")
    def smoothing_is_used(self) -> PairLossParams:
        self.require_used("label_smoothing", bool(self.label_smoothing), "takes_label_smoothing")
        for name, loss in self.losses.items():
            if loss.needs_label_smoothing and not self.label_smoothing:
                raise ValueError(f"the loss {name} needs label_smoothing: {loss.needs_label_smoothing}")
        return self

    @model_validator(mode="after")
    def everything_is_used(self) -> PairLossParams:
        self.require_used("beta", self.beta != type(self).model_fields["beta"].default, "takes_beta")
        self.require_used("policy_weighting", self.policy_weighting, "takes_policy_weight")
        self.require_used("group_pairs", self.group_pairs is not None, "sorts_pairs")
        # These change what the log-probability or the reward of an answer is, so that all that compare them must bear it.
        self.require_used("f_divergence", self.f_divergence is not None, "takes_divergence", by_all=True)
        self.require_used("tail_weight", self.tail_weight is not None, "takes_tail_weight", by_all=True)
        self.require_used("length_penalty", bool(self.length_penalty), "takes_length_penalty", by_all=True)
        takes_alpha = self.f_divergence is not None and DIVERGENCES[self.f_divergence].takes_alpha
        if self.f_divergence_alpha is not None and not takes_alpha:
            raise ValueError(
                "f_divergence_alpha has no effect without f_divergence: alpha_divergence: remove it, or write that too"
            )
        return self

    @model_validator(mode="after")
    def groups_fit(self) -> PairLossParams:
        size, group = self.global_batch_size, self.group_pairs
        if self.sorted_pairs is not None and size < 2:
            raise ValueError(
                "global_batch_size is 1, and a loss that sorts pairs learns from several: take a larger one"
            )
        if group is not None and size % group:
            raise ValueError(
                f"global_batch_size {size} is not a multiple of group_pairs {group}: take {multiple_of(group, size)}"
            )
        return self

    def require_used(self, param: str, given: bool, property_: str, *, by_all: bool = False) -> None:
        """Raises `ValueError` if `param` is given and none of the losses uses it; `by_all`: or one that compares does not."""
        if not given:
            return
        asked = {name: loss for name, loss in self.losses.items() if loss.compares or not by_all}
        without = [name for name, loss in asked.items() if not getattr(loss, property_)]
        if not asked or len(without) == len(asked) or (by_all and without):
            fit = [name for name, loss in PREFERENCE_LOSSES.items() if getattr(loss, property_)]
            raise ValueError(
                f"{param} has no effect with {named(without or self.losses)}: remove it, or take {', '.join(fit[:-1])}"
                f"{' or ' if len(fit) > 1 else ''}{fit[-1]}"
            )


def named(names: Any) -> str:
    names = list(names)
    return f"the loss {names[0]}" if len(names) == 1 else f"the losses {', '.join(names)}"


def multiple_of(group: int, size: int) -> str:
    """The multiples of `group` next to `size`, as one says them."""
    below = size - size % group
    return " or ".join(str(each) for each in (below, below + group) if each)


def group_problem(params: PairLossParams, micro_batch_size: int) -> Problem | None:
    """What is wrong if pairs that are sorted together would stand in several micro batches."""
    group = params.sorted_pairs
    if group is None or micro_batch_size % group == 0:
        return None
    smaller = math.gcd(micro_batch_size, params.global_batch_size)
    ways = [f"set params.group_pairs to {smaller}"] if smaller > 1 else []
    ways.append(f"make resources.micro_batch_size a multiple of {group}, on fewer resources.processes if need be")
    return Problem(
        "params.loss" if params.group_pairs is None else "params.group_pairs",
        f"{group} pairs are sorted together, and micro batches of {micro_batch_size} pairs would split them",
        f"{ways[0][0].upper()}{ways[0][1:]}{', or ' + ways[1] if len(ways) > 1 else ''}.",
    )


def loss_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong with the loss given inputs and resources: a reference that is not used, or groups that are split."""
    params: PairLossParams = forecast.params
    problems = []
    for role in ("reference", "reference_logprobs"):
        if role in forecast.inputs and not params.needs_reference:
            what = f"is given, and {named(params.losses)} compare{'s' if len(params.losses) == 1 else ''} with no reference"
            problems.append(Problem(f"inputs.{role}", what, "Remove it, or take a loss that has one, such as sigmoid."))
    try:
        batch = derive_batch(params.global_batch_size, forecast.resources)
    except RecipeError:
        return problems  # told by what checks every training
    problem = group_problem(params, batch.micro_batch_size)
    return [*problems, problem] if problem else problems
