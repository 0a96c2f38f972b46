"""What every training stage's recipe says: batch, length, learning rate, precision. Imports no torch, for `plan`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import Problem, RecipeError, did_you_mean
from pipeline.recipe import Resources
from pipeline.stage import Estimate, Forecast
from pipeline.strict import CHECKOUT, Strict
from stages.lib.arithmetic import field_of, memory_bytes_per_rank, parameter_count

LAYOUTS = CHECKOUT / "ds_configs"


class OptimizerParams(Strict):
    """How a stage that trains steps: learning rate, AdamW, precision."""

    learning_rate: float = Field(gt=0)
    """Learning rate at its highest, after the warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup, from its highest to `min_learning_rate_fraction` of it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises to its highest."""
    min_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine and linear schedules end, as a fraction of `learning_rate`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay. Norms and biases are never decayed."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm when they exceed it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass, and of the weights that are published."""


class TrainingParams(OptimizerParams):
    """Fields that every stage shares that trains on rows of fixed data. A stage's own params derive from this."""

    global_batch_size: int = Field(ge=1)
    """Rows (sequences, pairs, examples) per optimizer step, over all processes."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all. Give either this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows. Give either this or `max_steps`. Passes flow into each other: no batch is cut short."""
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations on held-out rows. None: only before the first and after the last step."""

    @model_validator(mode="after")
    def exactly_one_length(self) -> TrainingParams:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either max_steps or epochs, and not both")
        return self

    @model_validator(mode="after")
    def warmup_fits(self) -> TrainingParams:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}")
        return self


@dataclass(frozen=True)
class Batch:
    """How one optimizer step's rows are spread: `micro_batch_size` x `accumulation` x `processes` = `global_batch_size`."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    processes: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} = {self.micro_batch_size} per process and pass"
            f" x {self.accumulation} accumulated x {self.processes} processes"
        )


def derive_batch(global_batch_size: int, resources: Resources, processes: int | None = None) -> Batch:
    """The batch that `resources` make of `global_batch_size`. Raises `RecipeError` if it does not divide.

    `processes` is the number that really runs, where that is known.
    """
    processes = processes or resources.world_size
    micro = resources.micro_batch_size
    together = processes if micro is None else micro * processes
    if global_batch_size % together:
        passes = f"micro_batch_size {micro} x {processes} processes" if micro else f"{processes} processes"
        below = global_batch_size - global_batch_size % together
        sizes = [str(size) for size in (below, below + together) if size]
        raise RecipeError(
            Problem(
                "params.global_batch_size",
                f"{global_batch_size} is not a multiple of {together} ({passes})",
                f"Take {' or '.join(sizes)}, or change resources.micro_batch_size or resources.processes.",
            )
        )
    if micro is None:
        return Batch(global_batch_size, global_batch_size // processes, 1, processes)
    return Batch(global_batch_size, micro, global_batch_size // together, processes)


def optimizer_steps(params: TrainingParams, num_rows: int) -> int:
    """Optimizer steps of a run over `num_rows` training rows; `epochs` is rounded up to whole steps."""
    if params.max_steps is not None:
        return params.max_steps
    assert params.epochs is not None
    return max(1, math.ceil(params.epochs * num_rows / params.global_batch_size))


def learning_rate_factor(params: OptimizerParams, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (counted from 0) as a fraction of `params.learning_rate`.

    It rises by equal parts over the warmup, (step + 1) / (warmup + 1), so that no step is wasted on a rate of 0, is 1 at
    step `warmup_steps`, and falls towards `min_learning_rate_fraction`, which it would reach at step `total_steps`.
    Cosine: min + (1 - min) (1 + cos(pi x)) / 2 with x the part of the way (Loshchilov and Hutter, 2017).
    """
    warmup, lowest = params.warmup_steps, params.min_learning_rate_fraction
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if params.schedule == "constant":
        return 1.0
    way = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    height = (1 + math.cos(math.pi * way)) / 2 if params.schedule == "cosine" else 1 - way
    return lowest + (1 - lowest) * height


def layout_path(name: str) -> Path:
    """The file of a memory layout: a name in ds_configs/ or the path of a file. Raises `RecipeError` if there is none."""
    for path in (LAYOUTS / f"{name}.json", Path(name)):
        if path.is_file():
            return path
    known = sorted(path.stem for path in LAYOUTS.glob("*.json"))
    raise RecipeError(
        Problem("resources.deepspeed", f"there is no memory layout {name!r} in ds_configs/", did_you_mean(name, known))
    )


def read_layout(name: str) -> dict[str, Any]:
    """The DeepSpeed config of a memory layout. Raises `RecipeError` if it cannot be read."""
    path = layout_path(name)
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(Problem(str(path), f"is not JSON: {error}", "Compare with ds_configs/zero2.json.")) from None
    if not isinstance(layout, dict):
        raise RecipeError(Problem(str(path), "must hold one JSON object", "Compare with ds_configs/zero2.json."))
    return layout


def zero_stage(resources: Resources) -> int:
    """The ZeRO stage of the memory layout, 0 without one."""
    if resources.deepspeed is None:
        return 0
    return int(read_layout(resources.deepspeed).get("zero_optimization", {}).get("stage", 0))


def check_training(forecast: Forecast, global_batch_size: int | None = None) -> list[Problem]:
    """What is wrong with the batch and the memory layout of a training step, found before it runs."""
    problems: list[Problem | str] = []
    try:
        derive_batch(global_batch_size or forecast.params.global_batch_size, forecast.resources)
    except RecipeError as error:
        problems += error.problems
    try:
        zero_stage(forecast.resources)
    except RecipeError as error:
        problems += error.problems
    return [problem for problem in problems if isinstance(problem, Problem)]


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
) -> Estimate:
    """What `plan` can say of a training step: steps, batch, parameters, memory and disk, as far as each is known.

    `total_steps` where the stage's own params say them.
    """
    params, resources = forecast.params, forecast.resources
    if global_batch_size is not None:
        params = params.model_copy(update={"global_batch_size": global_batch_size})
    known = params.global_batch_size is not None
    batch = derive_batch(params.global_batch_size, resources) if known else None
    steps = total_steps
    if steps is None:
        steps = optimizer_steps(params, num_rows or 0) if known and (params.max_steps or num_rows) else params.max_steps
    # With the vocabulary unknown the size of the embeddings would be a guess.
    if parameters is None and architecture is not None and architecture.get("vocab_size"):
        parameters = parameter_count(architecture)
    sizes = [field_of(architecture or {}, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    memory = None
    if parameters and batch and sequence_length and all(sizes):
        memory = memory_bytes_per_rank(
            parameters=parameters,
            layout=read_layout(resources.deepspeed) if resources.deepspeed else None,
            world_size=resources.world_size,
            precision=params.precision,
            micro_batch=batch.micro_batch_size,
            sequence_length=sequence_length,
            hidden=sizes[0],
            layers=sizes[1],
            vocabulary=sizes[2],
            gradient_checkpointing=resources.gradient_checkpointing,
        )
    return Estimate(
        parameters=parameters,
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
        disk_bytes=parameters * (4 + CHECKPOINT_BYTES_PER_PARAMETER * (resources.keep_checkpoints + 1))
        if parameters
        else None,
    )


CHECKPOINT_BYTES_PER_PARAMETER = 18
"""Weights twice and Adam's two moments in float32, and a tenth more for what lies around them."""
