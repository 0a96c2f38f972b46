"""Which parameters an optimizer steps, and how: the one place where optimizers are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from stages.lib.training.params import OptimizerParams

Groups = list[dict[str, Any]]


def same_rate(name: str) -> float:
    return 1.0


def parameter_groups(
    modules: Sequence[tuple[nn.Module, float]], weight_decay: float, factor_of: Callable[[str], float] = same_rate
) -> tuple[Groups, list[float]]:
    """Groups for the optimizer, and the highest learning rate of each: per module its matrices, then its norms and biases.

    Weight decay is for matrices only. `factor_of` a parameter's name: what its rate is a multiple of its module's.
    """
    groups, rates = [], []
    for module, rate in modules:
        trained = [(factor_of(name), p) for name, p in module.named_parameters() if p.requires_grad]
        for factor in sorted({factor for factor, _ in trained}):
            for decay, wanted in ((weight_decay, True), (0.0, False)):
                # Under ZeRO-3 a parameter's own shape is that of its part.
                of_group = (p for each, p in trained if each == factor)
                members = [p for p in of_group if (len(getattr(p, "ds_shape", p.shape)) >= 2) is wanted]
                if members:
                    groups.append({"params": members, "weight_decay": decay})
                    rates.append(rate * factor)
    return groups, rates


def make_optimizer(groups: Groups, params: OptimizerParams) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) on the groups. The learning rates are set before each step."""
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=params.learning_rate,
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
    )
