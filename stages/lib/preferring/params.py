"""What the recipes of stages that train on preferences say, and what `plan` can say of them. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.stage import Estimate, Forecast
from stages.lib.models.adapters.params import require_comparable
from stages.lib.models.architectures import vocabulary_problems
from stages.lib.models.lengths import length_problems
from stages.lib.models.memory import BYTES
from stages.lib.models.noise import noise_problems
from stages.lib.text.template_date import TemplateDateParams
from stages.lib.text.template_forecast import untaught_problems
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams


class PreferenceParams(TemplateDateParams, TrainingParams):
    """One row is one pair, or one answer."""

    max_length_tokens: int = Field(ge=8)
    """Tokens per answer with its prompt. A longer prompt loses its oldest turns; a row that still does not fit is dropped, and counted."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the rows than this cannot be used."""


class PolicyParams(TrainingParams):
    """A causal model that is compared with a reference, token by token."""

    @property
    def trains_causal_lm(self) -> bool:
        return True

    @model_validator(mode="after")
    def nothing_is_dropped(self) -> PolicyParams:
        require_comparable(self.adapter)
        return self


def check_preference_training(forecast: Forecast) -> list[Problem]:
    """What is wrong with batch, memory layout, length and the model's chat template, found before the step runs."""
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    return [
        *check_training(forecast),
        *length_problems(architecture, forecast.params.max_length_tokens),
        *untaught_problems(forecast),
    ]


def check_policy_training(forecast: Forecast) -> list[Problem]:
    """The same of a policy and its reference, which may be an input: also one that cannot be of the same tokenizer."""
    hint = "Policy and reference must be of the same tokenizer."
    return [
        *check_preference_training(forecast),
        *vocabulary_problems(forecast, "reference", "model", hint),
        *noise_problems(forecast.inputs.get("model", Estimate()).architecture or {}),
    ]


def beside_reference_pass(forecast: Forecast, known: Estimate) -> Estimate:
    """What is known of the training, with the memory of the reference's pass where that takes more, as it may under ZeRO-3."""
    reference = forecast.inputs.get("reference", forecast.inputs.get("model", Estimate())).parameters
    if known.memory_bytes_per_rank is None or reference is None:
        return known
    width = BYTES[forecast.params.precision] if forecast.resources.deepspeed else BYTES["fp32"]
    return replace(known, memory_bytes_per_rank=max(known.memory_bytes_per_rank, reference * width))


def estimate_preference_training(
    forecast: Forecast, *, num_rows: int | None = None, sequences: int = 2, without_dropout: bool = False
) -> Estimate:
    """What is known of the model, and of the steps if no row is dropped. `sequences`: how many a row is; `num_rows`: how
    many rows are trained on, where it is not those of the input `preferences`.
    """
    model = forecast.inputs.get("model", Estimate())
    length = forecast.params.max_length_tokens
    if num_rows is None:
        num_rows = forecast.inputs.get("preferences", Estimate()).train_rows
    known = estimate_training(
        forecast,
        architecture=model.architecture,
        parameters=model.parameters,
        num_rows=num_rows,
        # In memory a pair is as much as one sequence of twice the length.
        sequence_length=sequences * length,
        vocabulary_size=model.vocabulary_size,
        without_dropout=without_dropout,
    )
    return replace(known, sequence_length=length)
