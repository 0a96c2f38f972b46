"""What ends a training on fixed data because it cannot be right: params that do not fit the data, numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Sized

import torch

from pipeline.errors import DataError, Problem, RecipeError
from pipeline.stage import EXTENDS, Context
from stages.lib.training.params import TrainingParams, learns_nothing, unreachable


def require_training_rows(data: Sized) -> None:
    """Raises `DataError` if there is nothing to train on."""
    if not len(data):
        raise DataError(Problem("training rows", "there are none", "Look at the ledger of the stage that made them."))


def require_sound(ctx: Context, params: TrainingParams, steps: int, device: torch.device) -> None:
    """Raises `RecipeError` with what is wrong with params now that the number of rows and the device are known."""
    problems = []
    if params.warmup_steps >= steps:
        what = f"{params.warmup_steps} is not below the {steps} steps that there are"
        problems.append(Problem("params.warmup_steps", what, "Lower it."))
    if params.precision == "fp16" and device.type == "cpu":
        problems.append(Problem("params.precision", "is fp16, which no CPU trains in", "Take bf16 or fp32."))
    for problem in (unreachable(params, steps), learns_nothing(params, steps)):
        if problem:
            problems.append(Problem("params", problem))
    if params.stretch_schedule and ctx.extends is None and EXTENDS not in ctx.inputs:
        problems.append(Problem("params.stretch_schedule", "has no effect without an input extends", "Remove it."))
    if problems:
        raise RecipeError(*problems)


def require_units(units: float, step: int) -> None:
    """Raises `DataError` if the step, counted from 1, has nothing to learn from."""
    if units <= 0:
        raise DataError(
            Problem(
                f"step {step}",
                "no row of the batch has anything to learn from (all labels are masked)",
                "Take a larger global_batch_size or max_length_tokens, or look at the rows.",
            )
        )


def require_number(what: str, value: float, step: int) -> None:
    """Raises `DataError` if the value is not finite. `step` is counted from 1."""
    if not math.isfinite(value):
        raise DataError(
            Problem(
                f"step {step}",
                f"the {what} is {value}",
                "Lower the learning rate, lengthen the warmup, or look at the rows of this step.",
            )
        )
