"""Which parameters an optimizer steps, and how."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(
    modules: list[tuple[nn.Module, float]], weight_decay: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Groups for the optimizer, and the highest learning rate of each: per module its matrices, then its norms and biases.

    Weight decay is for matrices only.
    """
    groups, rates = [], []
    for module, rate in modules:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            # Under ZeRO-3 a parameter's own shape is that of its part.
            members = [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) >= 2) is wanted]
            if members:
                groups.append({"params": members, "weight_decay": decay})
                rates.append(rate)
    return groups, rates
