"""Weights that ZeRO-3 has split over the processes, whole for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn


def gathered(weights: Sequence[nn.Parameter], *, writing: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Within it these weights are whole in every process, where ZeRO-3 has split them. All processes enter together.

    `writing`: what the first process writes into them is kept, and is in the others afterwards.
    """
    split = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not split:
        return contextlib.nullcontext()
    import deepspeed

    held: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        split, modifier_rank=0 if writing else None
    )
    return held
