"""From a model on disk to one in an engine, ready to be trained on fixed data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from pipeline.errors import Problem, RecipeError
from pipeline.stage import Context
from stages.lib.processes.joining import use_threads
from stages.lib.training.engine import Engine
from stages.lib.training.layouts import complete_layout, fit_to_width, split_while_loading
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import Batch, TrainingParams
from stages.lib.training.randomness import Randomness


def make_engine(
    ctx: Context,
    params: TrainingParams,
    batch: Batch,
    make_model: Callable[[], PreTrainedModel],
    device: torch.device,
    randomness: Randomness,
) -> tuple[Engine, PreTrainedModel, list[float]]:
    """The engine, the model that it trains, and the highest learning rate of each of the optimizer's groups."""
    layout = complete_layout(ctx.resources, params, batch)
    with split_while_loading(layout):
        model = make_model()
    prepare(model, ctx, randomness)
    groups, rates = parameter_groups([(model, params.learning_rate)], params.weight_decay)
    engine = Engine(ctx, model, groups, params, fit_to_width(layout, width_of(model)), device)
    use_threads(ctx.resources)
    return engine, model, rates


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
