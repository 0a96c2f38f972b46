"""What `plan` can say of an encoder task before it runs. Imports no torch."""

from __future__ import annotations

from pipeline.errors import Problem
from pipeline.stage import Estimate, Forecast
from stages.lib.models.lengths import length_problems
from stages.lib.text.template_forecast import unembedded_problems
from stages.lib.training.forecast import check_training
from stages.lib.training.params import optimizer_steps


def check_encoder_task(forecast: Forecast) -> list[Problem]:
    """What is wrong with batch, memory layout and length, found before the step runs."""
    config = forecast.inputs.get("encoder", Estimate()).architecture or {}
    length = length_problems(config, forecast.params.max_length_tokens)
    return [*check_training(forecast), *length, *unembedded_problems(forecast)]


def estimate_encoder_task(forecast: Forecast, data_role: str | None) -> Estimate:
    """What is known of the model beforehand, and of the steps if each row of `data_role` is one training row.

    The head is left out of the parameters: it is small, and its labels are not known yet.
    """
    params = forecast.params
    encoder = forecast.inputs.get("encoder", Estimate())
    rows = forecast.inputs.get(data_role, Estimate()).train_rows if data_role else None
    steps = params.max_steps or (optimizer_steps(params, rows) if rows else None)
    return Estimate(
        parameters=encoder.parameters,
        architecture=encoder.architecture,
        vocabulary_size=encoder.vocabulary_size,
        train_rows=rows,
        sequence_length=params.max_length_tokens,
        optimizer_steps=steps,
    )
