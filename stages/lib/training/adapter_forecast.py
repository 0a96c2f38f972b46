"""What is wrong with an adapter, and what is to be said of it, before the step runs. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.stage import BASE_ROLES, Estimate, Forecast
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.counting import Counted
from stages.lib.models.adapters.folders import (
    adapter_config,
    no_continuing,
    unreadable_adapter,
    weights_trained_in,
)
from stages.lib.models.adapters.methods import METHODS, count_ahead
from stages.lib.models.adapters.params import (
    ContinuedMethod,
    FreezeMethod,
    LoraMethod,
    PrefixTuningMethod,
    VirtualTokens,
    publishes_adapter,
)
from stages.lib.models.families import adapter_problems
from stages.lib.models.lengths import length_problems
from stages.lib.models.linears import WITHOUT_TORCHS_LINEARS
from stages.lib.training.layouts import readable_layout, zero_stage_of


def adapter_problems_ahead(forecast: Forecast) -> list[Problem]:
    """What can be told of an adapter without its model: that there is none, or that the two do not go together."""
    adapter = getattr(forecast.params, "adapter", None)
    if ("adapter" in forecast.inputs) != isinstance(adapter, ContinuedMethod):
        return [continuing_problem(forecast)]
    if adapter is None:
        return []
    roles = [role for role in BASE_ROLES if role in forecast.inputs]
    if not roles:
        what = "is for a model that has learned something, and the step makes a new one"
        return [Problem("params.adapter", what, "Name an input model, or train all weights: remove the adapter.")]
    problems = []
    architecture = forecast.inputs[roles[0]].architecture or {}
    counted = count_ahead(adapter, architecture) if architecture else None
    only_new = isinstance(adapter, FreezeMethod) and adapter.only_new
    if only_new and counted is not None and counted.trained == 0:
        if forecast.params.trains_causal_lm:  # else there is a new head
            what = "is true, and the model has no layers that a step `deepen` added"
            hint = "Make some in a step `deepen`, or give last_layers or modules."
            problems.append(Problem("params.adapter.only_new", what, hint))
    elif counted is not None and counted.trained == 0:
        what = f"finds nothing to train: models of the type {architecture.get('model_type')} have no such parameters"
        problems.append(Problem("params.adapter", f"{adapter.method} {what}", "Take lora, or freeze with last_layers."))
    if isinstance(adapter, LoraMethod):
        problems += adapter_problems(architecture, adapter.target_modules)
        if adapter.quantize_base and architecture.get("model_type") in WITHOUT_TORCHS_LINEARS:
            what = f"is {adapter.quantize_base}, and models of the type {architecture['model_type']} have no linear layers of torch"
            problems.append(Problem("params.adapter.quantize_base", what, "Remove it: the base is then kept as it is."))
        if adapter.use_dora and zero_stage_of(readable_layout(forecast.resources)) == 3:
            what = "is true, and reads whole weights in every pass, which ZeRO-3 has split"
            problems.append(
                Problem("params.adapter.use_dora", what, "Set it to false, or resources.deepspeed to zero2.")
            )
    if isinstance(adapter, AdaLoraMethod):
        problems += adapter_problems(architecture, adapter.target_modules) + budget_problems(forecast)
    if isinstance(adapter, ContinuedMethod) and (folder := forecast.inputs["adapter"].folder) is not None:
        problems += no_continuing(folder)
        if (
            not problems
            and adapter_config(folder).get("use_dora")
            and zero_stage_of(readable_layout(forecast.resources)) == 3
        ):
            what = "is a DoRA, which reads whole weights in every pass, and ZeRO-3 has split them"
            problems.append(Problem("inputs.adapter", what, "Set resources.deepspeed to zero2."))
    if isinstance(adapter, PrefixTuningMethod) and forecast.resources.gradient_checkpointing:
        what = "is true, and layers that are computed again would not see the prefix"
        hint = "Set it to false, or take prompt_tuning, p_tuning or lora."
        problems.append(Problem("resources.gradient_checkpointing", what, hint))
    if isinstance(adapter, VirtualTokens):
        problems += room_for_virtual_tokens(forecast, adapter)
    return problems


def budget_problems(forecast: Forecast) -> list[Problem]:
    """What is wrong if gradients cannot be had whole, by which an adalora finds its ranks."""
    layout = readable_layout(forecast.resources)
    block = (layout or {}).get("zero_optimization", {})
    # Of round robin, DeepSpeed itself mistakes where a parameter lies.
    elsewhere = block.get("offload_optimizer") or block.get("round_robin_gradients")
    if layout is None or (zero_stage_of(layout) in (1, 2) and not elsewhere):
        return []
    what = "is adalora, which prunes by whole gradients and weights, and this layout does not keep them where it looks"
    hint = "Set resources.deepspeed to zero2 or null; or take lora."
    return [Problem("params.adapter", what, hint)]


def continuing_problem(forecast: Forecast) -> Problem:
    """That the input `adapter` and the block do not say the same of what is to become of it."""
    if "adapter" not in forecast.inputs:
        what = "is continued, and there is no input adapter"
        return Problem(
            "params.adapter.method", what, "Add `adapter` to inputs, with its base as the model; or take lora."
        )
    what = "is there, and params do not say that it is trained further"
    hint = "Set `adapter: {method: continued}`; for a new adapter, or all weights, on top of it, name a step `merge` as the model."
    return Problem("inputs.adapter", what, hint)


def room_for_virtual_tokens(forecast: Forecast, adapter: VirtualTokens) -> list[Problem]:
    """What is wrong if the model does not take the texts with as many tokens before them."""
    role = next(role for role in BASE_ROLES if role in forecast.inputs)
    asked = getattr(forecast.params, "max_length_tokens", None)
    length = asked or forecast.inputs.get("tokens", Estimate()).sequence_length
    where = "params.max_length_tokens" if asked else "params.adapter.num_virtual_tokens"
    return length_problems(
        forecast.inputs[role].architecture or {},
        length + adapter.num_virtual_tokens if length else None,
        where=where,
        what=f"is {asked or adapter.num_virtual_tokens}, which with the virtual tokens is {{tokens}} in all",
        hint="Take {above} fewer of either.",
    )


def counted_ahead(forecast: Forecast, architecture: Mapping[str, Any] | None) -> Counted | None:
    """What the adapter that the params ask for trains of a causal model; None where all is trained, or that is not known."""
    adapter = getattr(forecast.params, "adapter", None)
    if isinstance(adapter, ContinuedMethod):
        return counted_before(forecast.inputs.get("adapter", Estimate()))
    return count_ahead(adapter, architecture) if adapter is not None and architecture else None


def counted_before(given: Estimate) -> Counted | None:
    """What is trained of an adapter that is trained further: all of it, read from its file, or what the step before will make."""
    if given.folder is None or unreadable_adapter(given.folder):
        weights = given.adapter_weights
        return Counted(weights, weights if given.added_parameters else 0) if weights is not None else None
    return Counted(*weights_trained_in(given.folder))


def published_method(params: Any) -> str | None:
    """The method of the adapter that is published alone; None where a whole model is."""
    adapter = getattr(params, "adapter", None)
    return str(adapter.method) if publishes_adapter(adapter) else None


def adapter_notes(forecast: Forecast) -> tuple[str, ...]:
    """What later steps can do with an artifact that is an adapter alone."""
    method = published_method(forecast.params)
    if method is None:
        return ()
    if METHODS[type(forecast.params.adapter)].can_be_merged:
        how = "an adapter alone is published: steps that read adapters take it, and `merge` makes a whole model of it"
        return (how,)
    how = f"an adapter of the method {method} alone is published, which has no weights to merge"
    return (f"{how}: steps that read adapters (evaluate), `slipway chat` and peft put it on its base",)
