"""What `plan` can say of a training step before it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, RecipeError
from pipeline.stage import BASE_ROLES, Estimate, Forecast
from stages.lib.models.adapters.counting import count_published, count_quantized_ahead
from stages.lib.models.arithmetic import field_of, parameter_count
from stages.lib.models.generation import generation_notes
from stages.lib.models.memory import memory_bytes_per_rank
from stages.lib.models.noise import dropped_heads, noise_notes
from stages.lib.training.adapter_forecast import (
    adapter_notes,
    adapter_problems_ahead,
    counted_ahead,
    published_method,
)
from stages.lib.training.extension import extension_problems_ahead
from stages.lib.training.layouts import layout_problems, read_layout, readable_layout
from stages.lib.training.params import TrainingParams, derive_batch, optimizer_steps


def check_training(forecast: Forecast, global_batch_size: int | None = None) -> list[Problem]:
    """What is wrong with the batch and the memory layout of a training step, found before it runs."""
    problems: list[Problem | str] = [*extension_problems_ahead(forecast)]
    batch = None
    try:
        batch = derive_batch(global_batch_size or forecast.params.global_batch_size, forecast.resources)
    except RecipeError as error:
        problems += error.problems
    try:
        if forecast.resources.deepspeed is not None:
            problems += layout_problems(read_layout(forecast.resources.deepspeed), forecast.params, batch)
    except RecipeError as error:
        problems += error.problems
    found = [problem for problem in problems if isinstance(problem, Problem)]
    return found + adapter_problems_ahead(forecast)


def estimate_training(
    forecast: Forecast,
    *,
    architecture: Mapping[str, Any] | None,
    num_rows: int | None,
    sequence_length: int | None,
    global_batch_size: int | None = None,
    parameters: int | None = None,
    vocabulary_size: int | None = None,
    train_tokens: int | None = None,
    total_steps: int | None = None,
    without_dropout: bool = False,
) -> Estimate:
    """What `plan` can say of a training step: steps, batch, parameters, memory and disk, as far as each is known.

    `total_steps` where the stage's own params say them, `without_dropout` where it drops nothing.
    """
    params, resources = forecast.params, forecast.resources
    if global_batch_size is not None:
        params = params.model_copy(update={"global_batch_size": global_batch_size})
    known = params.global_batch_size is not None
    batch = derive_batch(params.global_batch_size, resources) if known else None
    steps = total_steps or params_steps(params, num_rows)
    # With the vocabulary unknown the size of the embeddings would be a guess.
    if parameters is None and architecture is not None and architecture.get("vocab_size"):
        parameters = parameter_count(architecture)
    config = architecture or {}
    counted = counted_ahead(forecast, architecture)
    trained = counted.trained if counted else None
    adapter_weights = count_published(getattr(params, "adapter", None), trained)
    memory = None
    if parameters and batch and sequence_length:
        memory = memory_of_training(
            forecast,
            config,
            parameters=parameters + (counted.added if counted else 0),
            trained=trained,
            micro_batch=batch.micro_batch_size,
            sequence_length=sequence_length,
            without_dropout=without_dropout,
        )
    return Estimate(
        parameters=parameters,
        trained_parameters=trained,
        added_parameters=counted.added if counted else None,
        adapter=published_method(params),
        adapter_weights=adapter_weights,
        architecture=architecture,
        vocabulary_size=vocabulary_size,
        train_rows=num_rows,
        train_tokens=train_tokens,
        sequence_length=sequence_length,
        optimizer_steps=steps,
        global_batch_size=batch.global_batch_size if batch else None,
        micro_batch_size=batch.micro_batch_size if batch else None,
        accumulation=batch.accumulation if batch else None,
        memory_bytes_per_rank=memory,
        disk_bytes=disk_bytes_of(params, parameters, trained, adapter_weights, most_checkpoints(forecast)),
        notes=notes_of(forecast, config, without_dropout=without_dropout) or None,
    )


def most_checkpoints(forecast: Forecast) -> int:
    """How many checkpoints lie on the disk at once: those that are kept, that of the best step, and the one being written."""
    keeps_best = getattr(forecast.params, "publish_best", None) is not None
    return forecast.resources.keep_checkpoints + keeps_best + 1


def memory_of_training(
    forecast: Forecast,
    architecture: Mapping[str, Any],
    *,
    parameters: int,
    trained: int | None,
    micro_batch: int,
    sequence_length: int,
    without_dropout: bool,
) -> int | None:
    """`memory_bytes_per_rank` of the step; None where the model's sizes or the memory layout are not known."""
    resources = forecast.resources
    sizes = [field_of(architecture, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    layout = readable_layout(resources)
    if not all(sizes) or (layout is None) != (resources.deepspeed is None):
        return None
    return memory_bytes_per_rank(
        parameters=parameters,
        trained=trained,
        layout=layout,
        world_size=resources.world_size,
        precision=forecast.params.precision,
        micro_batch=micro_batch,
        sequence_length=sequence_length,
        hidden=sizes[0],
        layers=sizes[1],
        vocabulary=sizes[2],
        gradient_checkpointing=resources.gradient_checkpointing,
        dropped_heads=0 if without_dropout else dropped_heads(architecture),
        quantized=count_quantized_ahead(getattr(forecast.params, "adapter", None), architecture),
    )


def disk_bytes_of(
    params: Any, parameters: int | None, trained: int | None, adapter_weights: int | None, checkpoints: int
) -> int | None:
    """What is published, an adapter alone, beside its model, or none; and the checkpoints: these hold what is trained only."""
    if not parameters:
        return None
    learned = parameters if trained is None else trained
    beside = 0 if published_method(params) is not None else parameters
    published = beside + (adapter_weights if adapter_weights is not None else learned if not beside else 0)
    return 4 * published + CHECKPOINT_BYTES_PER_PARAMETER * checkpoints * learned


def notes_of(forecast: Forecast, architecture: Mapping[str, Any], *, without_dropout: bool) -> tuple[str, ...]:
    """What a user should read before the step starts."""
    noise = () if without_dropout else noise_notes(architecture)
    return (*noise, *generation_notes(base_folder(forecast)), *adapter_notes(forecast))


def base_folder(forecast: Forecast) -> Path | None:
    """Where the model lies that training goes on from, if it is there already."""
    models = [forecast.inputs[role] for role in BASE_ROLES if role in forecast.inputs]
    return models[0].folder if models else None


def params_steps(params: TrainingParams, num_rows: int | None) -> int | None:
    """The steps that the params and as many rows make, as far as they are known."""
    known = params.global_batch_size is not None and (params.max_steps or num_rows)
    return optimizer_steps(params, num_rows or 0) if known else params.max_steps


CHECKPOINT_BYTES_PER_PARAMETER = 18
"""Weights twice and Adam's two moments in float32, and a tenth more for what lies around them."""
