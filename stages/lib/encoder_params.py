"""What `plan` can say of an encoder task before it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.stage import Estimate, Forecast
from stages.lib.training_params import check_training, optimizer_steps

SHIFTED_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"})
"""Model types that number positions from the padding id on, and so take fewer tokens than they have positions."""


def longest_text(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model with this `config.json` takes at once, or None where it sets no limit."""
    positions = config.get("max_position_embeddings")
    if positions is None:
        return None
    padding = config.get("pad_token_id")
    shift = 1 + (1 if padding is None else int(padding)) if config.get("model_type") in SHIFTED_POSITIONS else 0
    return int(positions) - shift


def length_problems(config: Mapping[str, Any], max_length_tokens: int) -> list[Problem]:
    """What is wrong if texts of `max_length_tokens` are longer than the encoder takes."""
    limit = longest_text(config)
    if limit is None or max_length_tokens <= limit:
        return []
    return [
        Problem(
            "params.max_length_tokens",
            f"is {max_length_tokens}, and the encoder takes {limit} tokens",
            f"Lower it to {limit}, or train an encoder with more positions.",
        )
    ]


def check_encoder_task(forecast: Forecast) -> list[Problem]:
    """What is wrong with batch, memory layout and length, found before the step runs."""
    config = forecast.inputs.get("encoder", Estimate()).architecture or {}
    return [*check_training(forecast), *length_problems(config, forecast.params.max_length_tokens)]


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
