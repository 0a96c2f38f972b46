"""What a step may say that makes a finished training longer, so that it is that training. Imports no torch."""

from __future__ import annotations

from pipeline.errors import Problem
from pipeline.stage import Forecast
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.training.params import TrainingParams

EXTENSION_PARAMS = frozenset(
    {
        "max_steps",
        "epochs",
        "schedule_steps",
        "stretch_schedule",
        "evaluate_every_steps",
        "publish_best",
        "stop_early",
        "license",
        "published_dtype",
    }
)
"""The params in which it may differ from what it extends: how long, what of it is published, and how."""


def extension_problems(params: TrainingParams, steps: int, made: int, fell_over: int) -> list[Problem]:
    """Why a training of `steps` cannot go on from one that ended after `made`, and whose schedule was made for `fell_over`."""
    problems = []
    if isinstance(params.adapter, AdaLoraMethod):
        what = "is adalora, whose ranks were found over the steps of what it extends, and would be others over more"
        hint = "Train it further as the input adapter, with `method: continued`; or train anew: leave out the input extends."
        problems.append(Problem("params.adapter", what, hint))
    if made >= steps:
        where = "params.max_steps" if params.max_steps else "params.epochs"
        problems.append(Problem(where, f"makes {steps} steps, and what it extends has made {made}", "Raise it."))
    length = params.schedule_steps or steps
    if params.schedule == "constant" or params.stretch_schedule or length == fell_over:
        return problems
    what = (
        f"is {params.schedule}: in what it extends the learning rate was to fall over {fell_over} steps, and here it would"
        f" over {length}"
    )
    stretch = (
        "stretch_schedule to true, so that it jumps to where it would be had it fallen over all steps from the beginning; or"
        f" make what is extended with schedule_steps {length}"
    )
    hint = f"Set {stretch}."
    if fell_over >= steps:
        hint = f"Set schedule_steps to {fell_over}, so that it goes on falling as it did; or set {stretch}."
    elif params.min_learning_rate_fraction:
        hint = f"Set schedule_steps to {fell_over}, so that it stays at min_learning_rate_fraction; or set {stretch}."
    return [*problems, Problem("params.schedule", what, hint)]


def extension_problems_ahead(forecast: Forecast) -> list[Problem]:
    """The same, as far as `plan` knows how long either is; and what has no effect where nothing is extended."""
    params, extended = forecast.params, forecast.extended
    if not isinstance(params, TrainingParams):
        return []  # trained on its own completions, which nothing makes longer
    if extended is None:
        if params.stretch_schedule:
            return [Problem("params.stretch_schedule", "has no effect without an input extends", "Remove it.")]
        return []
    total = extended.total_steps or extended.params.get("max_steps")
    if params.max_steps is None or total is None:
        return []  # how many steps passes make is told when the step starts
    may_stop = extended.params.get("stop_early") is not None
    made = extended.steps_made or (0 if may_stop else total)
    return extension_problems(params, params.max_steps, made, extended.params.get("schedule_steps") or total)
