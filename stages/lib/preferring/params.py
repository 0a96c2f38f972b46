"""What the recipes of stages that train on preference pairs say, and what `plan` can say of them. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from pipeline.errors import Problem
from pipeline.stage import Estimate, Forecast
from stages.lib.models.lengths import length_problems
from stages.lib.text.template_date import TemplateDateParams
from stages.lib.text.template_forecast import untaught_problems
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams


class PreferenceParams(TemplateDateParams, TrainingParams):
    """One row is one pair."""

    max_length_tokens: int = Field(ge=8)
    """Tokens per answer with its prompt. A longer prompt loses its oldest turns; a pair that still does not fit is dropped, and counted."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the pairs than this cannot be used."""


def check_preference_training(forecast: Forecast) -> list[Problem]:
    """What is wrong with batch, memory layout, length and the model's chat template, found before the step runs."""
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    return [
        *check_training(forecast),
        *length_problems(architecture, forecast.params.max_length_tokens),
        *untaught_problems(forecast),
    ]


def estimate_preference_training(forecast: Forecast, *, without_dropout: bool = False) -> Estimate:
    """What is known of the model, and of the steps if no pair is dropped."""
    model = forecast.inputs.get("model", Estimate())
    length = forecast.params.max_length_tokens
    known = estimate_training(
        forecast,
        architecture=model.architecture,
        parameters=model.parameters,
        num_rows=forecast.inputs.get("preferences", Estimate()).train_rows,
        # In memory a pair is as much as one sequence of twice the length.
        sequence_length=2 * length,
        vocabulary_size=model.vocabulary_size,
        without_dropout=without_dropout,
    )
    return replace(known, sequence_length=length)
