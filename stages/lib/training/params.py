"""What every training stage's recipe says: batch, length, learning rate, precision. Imports no torch, for `plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field, FieldSerializationInfo, field_serializer, model_validator

from pipeline.errors import Problem, RecipeError
from pipeline.settings.resources import Resources
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import LearningRate, Scale, Weight
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.params import (
    AdapterParams,
    ContinuedMethod,
    Unmergeable,
    mergeable_methods,
    publishes_adapter,
)
from stages.lib.models.published import PublishedDtype, PublishedParams
from stages.lib.training.selection import PublishBest, StopEarly, watched_problem


class OptimizerParams(PublishedParams):
    """How a stage that trains steps: learning rate, AdamW, precision."""

    learning_rate: LearningRate
    """Learning rate at its highest, after the warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup, from its highest to `min_learning_rate_fraction` of it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises to its highest."""
    min_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine and linear schedules end, as a fraction of `learning_rate`."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay. Norms and biases are never decayed."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, ge=1e-12, le=1e-2)
    """Added to the denominator of Adam's update."""
    max_gradient_norm: Scale = 1.0
    """Gradients are scaled down to this global L2 norm when they exceed it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass."""
    published_dtype: PublishedDtype | None = None
    """Number format of the weights that are published. null: where precision is fp32, that of the model that training starts from, and fp32 of a new model; else as precision says."""


class AdaptedParams(OptimizerParams):
    """What stages share that train all weights of a model, or an adapter in their place."""

    adapter: AdapterParams | None = Field(default=None, exclude_if=lambda adapter: adapter is None)
    """An adapter, or a part of the weights, that is trained in place of all of them: `method` and the fields of that method, as {method: lora, rank: 16}. The table in stages/README.md says what each is, and when it fits. null: all weights are trained."""

    @property
    def publishes_adapter(self) -> bool:
        """Whether the artifact is the adapter alone."""
        return publishes_adapter(self.adapter)


class TrainingParams(AdaptedParams):
    """Fields that every stage shares that trains on rows of fixed data. A stage's own params derive from this."""

    global_batch_size: int = Field(ge=1)
    """Rows (sequences, pairs, examples) per optimizer step, over all processes."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all. Give either this or `epochs`."""
    epochs: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Passes over the training rows. Give either this or `max_steps`. Passes flow into each other: no batch is cut short."""
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations on held-out rows. None: only before the first and after the last step. It is no part of what the artifact is, and may be changed while a training is interrupted, unless publish_best or stop_early go by what is measured."""
    publish_best: PublishBest | None = Field(default=None, exclude_if=lambda best: best is None)
    """Publishes, of the steps that are measured (every evaluate_every_steps, and the last), the one with the best value of a held-out metric, as {metric: heldout_loss}; of equals the earliest. Its checkpoint is kept as long as it is the best. null: the last step."""
    stop_early: StopEarly | None = Field(default=None, exclude_if=lambda stop: stop is None)
    """Ends the training once so many measurements in a row were no improvement, as {metric: heldout_loss, patience: 3, least_improvement: 0.01}. The schedule of the learning rate stays that of all steps. null: never."""
    schedule_steps: int | None = Field(default=None, ge=1, exclude_if=lambda steps: steps is None)
    """Optimizer steps over which the cosine and linear schedules fall. More than there are: as the first part of a longer training, which can extend this one. Fewer: afterwards the rate stays at min_learning_rate_fraction. null: all steps."""

    stretch_schedule: bool = Field(default=False, exclude_if=lambda stretched: not stretched)
    """Only with the input `extends`: whether the learning rate of a cosine or linear schedule, from where that training ended, is as if it had fallen over all steps from the beginning: it jumps up, and falls again. The result is not that of one long training. false: where it would, the extension is refused."""

    def measures(self) -> tuple[str, ...]:
        """The held-out metrics that the stage measures; a `*` stands for names that data decides. None: not known here."""
        return ()

    @property
    def goes_by_measurements(self) -> bool:
        """Whether what is measured in training decides what is published."""
        return self.publish_best is not None or self.stop_early is not None

    @field_serializer("evaluate_every_steps")
    def cadence(self, steps: int | None, info: FieldSerializationInfo) -> int | None:
        """The steps; in an identity (where the context is a digest function) none, where they decide nothing."""
        return steps if self.goes_by_measurements or not callable(info.context) else None

    @model_validator(mode="after")
    def what_is_watched_is_measured(self) -> TrainingParams:
        for param, watched in (("publish_best", self.publish_best), ("stop_early", self.stop_early)):
            if watched is None:
                continue
            if self.evaluate_every_steps is None:
                raise ValueError(f"{param} goes by what is measured in training: set evaluate_every_steps, too")
            if problem := watched_problem(param, watched, self.measures()):
                raise ValueError(problem)
        if self.max_steps is not None and (problem := unreachable(self, self.max_steps)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def schedule_fits(self) -> TrainingParams:
        length = self.schedule_steps
        for name in ("schedule_steps", "stretch_schedule"):
            if getattr(self, name) and self.schedule == "constant":
                raise ValueError(f"{name} has no effect on the constant schedule: remove it")
        if length is None:
            return self
        if self.warmup_steps >= length:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below schedule_steps {length}")
        if self.max_steps is not None and (problem := learns_nothing(self, self.max_steps)):
            raise ValueError(problem)
        return self

    @property
    def trains_causal_lm(self) -> bool:
        """Whether what is trained predicts the next token: then it may read virtual tokens, and be published as an adapter."""
        return False

    @model_validator(mode="after")
    def adapter_fits_the_model(self) -> TrainingParams:
        if self.adapter is None or self.trains_causal_lm:
            return self
        if isinstance(self.adapter, ContinuedMethod):
            raise ValueError(f"adapter: continued is for causal models alone: take {mergeable_methods()}")
        if isinstance(self.adapter, Unmergeable):
            raise ValueError(f"adapter: {self.adapter.method} is for causal models alone: take {mergeable_methods()}")
        if self.publishes_adapter:
            raise ValueError(
                "adapter: publish: adapter is for causal models alone, which `merge` takes: set publish: merged; the adapter "
                "is then in the folder adapter/ of the artifact as well"
            )
        return self

    @model_validator(mode="after")
    def ranks_can_be_found(self) -> TrainingParams:
        if isinstance(self.adapter, AdaLoraMethod):
            if self.precision == "fp16":
                raise ValueError("adapter: adalora reads gradients, which fp16 scales: set precision to bf16 or fp32")
            if self.max_steps is not None and (problem := self.adapter.too_short(self.max_steps)):
                raise ValueError(problem)
        return self

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


def causal_lm_or_adapter(params: AdaptedParams, inputs: Mapping[str, Kind]) -> Kind:
    """What a stage makes that trains a causal model."""
    return Kind.ADAPTER if params.publishes_adapter else Kind.CAUSAL_LM


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


class Passes(Protocol):
    """What says how long a training is."""

    max_steps: int | None
    epochs: float | None
    global_batch_size: int


def optimizer_steps(params: Passes, num_rows: int) -> int:
    """Optimizer steps of a run over `num_rows` training rows; `epochs` is rounded up to whole steps."""
    if params.max_steps is not None:
        return params.max_steps
    assert params.epochs is not None
    return max(1, math.ceil(params.epochs * num_rows / params.global_batch_size))


def unreachable(params: TrainingParams, steps: int) -> str | None:
    """Why what is measured in a training of so many steps can decide nothing, where that is so."""
    every, stop = params.evaluate_every_steps, params.stop_early
    if every is None or not params.goes_by_measurements:
        return None
    if every >= steps:
        return f"evaluate_every_steps {every} must be below the {steps} steps: else only the last one is measured"
    if stop is not None and (stop.patience + 1) * every >= steps:
        first = (stop.patience + 1) * every
        return (
            f"stop_early.patience: with evaluate_every_steps {every} a patience of {stop.patience} ends at step {first} at"
            f" the earliest, and there are {steps}: lower either, or remove stop_early"
        )
    return None


def learns_nothing(params: TrainingParams, steps: int) -> str | None:
    """Why the last of so many steps would have a learning rate of 0, where that is so."""
    length = params.schedule_steps
    if length is None or length >= steps or params.min_learning_rate_fraction:
        return None
    return (
        f"schedule_steps {length} is below the {steps} steps, and the learning rate would be 0 from then on: raise it, or set"
        " min_learning_rate_fraction"
    )


def schedule_length(params: TrainingParams, total_steps: int) -> int:
    """Optimizer steps over which the learning rate falls."""
    return params.schedule_steps or total_steps


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
