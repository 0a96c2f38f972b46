"""How far numbers of a recipe may go, so that the arithmetic of single precision bears them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


@dataclass(frozen=True)
class NothingOr:
    """Lets 0 pass, which turns something off, and what is large enough to change anything."""

    least: float

    def __call__(self, value: float) -> float:
        if value and abs(value) < self.least:
            raise ValueError(f"must be 0 or at least {self.least:g}, not {value!r}: less is lost in rounding")
        return value


LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.001, 100.0

Temperature = Annotated[float, Field(ge=LEAST_TEMPERATURE, le=LARGEST_TEMPERATURE)]
"""A divisor of logits: below, differences of 0.1 become infinite odds; above, all tokens are alike."""

TemperatureOrGreedy = Annotated[
    float, Field(ge=0, le=LARGEST_TEMPERATURE), AfterValidator(NothingOr(LEAST_TEMPERATURE))
]
"""The same, or 0 for always the likeliest token."""

Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A factor, a divisor or a distance that must be there."""

Weight = Annotated[float, Field(ge=0, le=1e6), AfterValidator(NothingOr(1e-8))]
"""A part of a sum, left out with 0."""

SignedWeight = Annotated[float, Field(ge=-1e6, le=1e6), AfterValidator(NothingOr(1e-8))]
"""A part of a sum that may count against it."""

LearningRate = Annotated[float, Field(ge=1e-12, le=10)]
"""Below, no weight in single precision changes."""

Nucleus = Annotated[float, Field(ge=1e-3, le=1)]
"""A share of the probability: below a thousandth it is the likeliest token alone."""
