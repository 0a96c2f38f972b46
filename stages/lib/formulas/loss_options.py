"""Numbers of a loss's own, which a recipe sets by name under `loss_options`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LossOption:
    """A number of a loss's own, which a recipe sets under `loss_options`."""

    default: float
    least: float
    most: float
    meaning: str


def require_option(
    key: str, value: float, known: Mapping[str, LossOption], losses: str, table: Mapping[str, Any]
) -> None:
    """Raises `ValueError` unless `known` has an option of this name which may have this value.

    `losses` names those of the recipe, and `table` has the rows of all, each with its `options`.
    """
    if key not in known:
        elsewhere = [name for name, loss in table.items() if key in loss.options]
        way = f"remove it, or take {elsewhere[0]}" if elsewhere else "remove it"
        has = ", ".join(f"{name} ({option.meaning})" for name, option in known.items())
        have = "has" if losses.startswith("the loss ") else "have"
        raise ValueError(f"loss_options.{key} has no effect with {losses}, which {have} {has or 'no options'}: {way}")
    option = known[key]
    if not (math.isfinite(value) and option.least <= value <= option.most):
        raise ValueError(
            f"loss_options.{key} must be from {option.least:g} to {option.most:g}, not {value!r}: {option.meaning}"
        )
