"""From a model on disk to one in an engine, ready to be trained on fixed data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import DataError, Problem, RecipeError
from pipeline.stage import Context
from stages.lib.models.adapters.attaching import count_trained
from stages.lib.models.adapters.budget import RankBudget
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.four_bits import count_quantized
from stages.lib.models.adapters.methods import METHODS
from stages.lib.models.adapters.params import ContinuedMethod
from stages.lib.models.loading import count_parameters
from stages.lib.processes.joining import use_threads
from stages.lib.training.continuing import require_base_of_adapter, with_adapter_to_train
from stages.lib.training.engine import Engine
from stages.lib.training.layouts import complete_layout, fit_to_width, split_while_loading
from stages.lib.training.optimizer import parameter_groups, same_rate
from stages.lib.training.params import AdaptedParams, Batch, TrainingParams
from stages.lib.training.randomness import Randomness


@dataclass(frozen=True)
class Made:
    """What is trained, and what trains it."""

    engine: Engine
    model: Any
    """A model of transformers; under an adapter of peft, peft's model around it."""
    rates: list[float]
    """The highest learning rate of each of the optimizer's groups."""
    parameters: int
    """Those of the model, without an adapter's."""
    trained: int
    """Those that are trained."""


def make_engine(
    ctx: Context,
    params: TrainingParams,
    batch: Batch,
    make_model: Callable[[], PreTrainedModel],
    device: torch.device,
    randomness: Randomness,
    steps: int,
) -> Made:
    """The model under its adapter, if it gets one, in an engine that is to make so many steps.

    Raises `DataError` where an adapter does not fit the model, `RecipeError` where it does not fit the steps.
    """
    if isinstance(params.adapter, AdaLoraMethod) and (problem := params.adapter.too_short(steps)):
        raise RecipeError(Problem("params", problem))
    layout = complete_layout(ctx.resources, params, batch)
    with split_while_loading(layout):
        model = make_model()
    prepare(model, ctx, randomness)
    width, parameters = width_of(model), count_parameters(model)
    with split_while_loading(layout):  # else peft would take the split weights that it begins with for whole ones
        adapted = put_adapter_on(model, ctx, params)
    groups, rates = parameter_groups([(adapted, params.learning_rate)], params.weight_decay, rate_factors(params))
    engine = Engine(ctx, adapted, groups, params, fit_to_width(layout, width), device)
    if isinstance(params.adapter, AdaLoraMethod):
        engine.companion = RankBudget(adapted, params.adapter, steps)
    use_threads(ctx.resources)
    return Made(engine, adapted, rates, parameters, count_trained(adapted))


def put_adapter_on(model: PreTrainedModel, ctx: Context, params: TrainingParams) -> Any:
    """The model under a fresh adapter where the params ask for one, ready to be trained; the journal is told its share."""
    if params.adapter is None:
        return model
    if ctx.base is None:
        what = "is for a model that has learned something, and this one is new"
        raise DataError(
            Problem("params.adapter", what, "Name an input model, or train all weights: remove the adapter.")
        )
    if isinstance(params.adapter, ContinuedMethod):
        require_base_of_adapter(ctx)
    adapted = with_adapter_to_train(model, ctx, params.adapter).train()
    trained, whole = count_trained(adapted), count_parameters(adapted) + count_quantized(adapted)
    ctx.journal.note(f"{params.adapter.method} trains {trained:,} of {whole:,} parameters ({trained / whole:.3%})")
    return adapted


def rate_factors(params: AdaptedParams) -> Callable[[str], float]:
    """A parameter's name -> what its learning rate is a multiple of the stage's."""
    if params.adapter is None:
        return same_rate
    adapter, method = params.adapter, METHODS[type(params.adapter)]
    return lambda name: method.rate_factor(adapter, name)


def prepare(model: PreTrainedModel, ctx: Context, randomness: Randomness) -> None:
    """The model ready to be trained: without a cache of keys and values, and with checkpointing where it is asked for."""
    model.config.use_cache = False
    if ctx.resources.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            what = f"is true, and {type(model).__name__} has no such thing"
            raise RecipeError(Problem("resources.gradient_checkpointing", what, "Set it to false."))
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": randomness.dropout.recomputing})
    model.train()


def width_of(model: PreTrainedModel) -> int:
    """The model's hidden size."""
    return int(model.config.get_text_config().hidden_size)
