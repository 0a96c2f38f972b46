"""Low-rank adapters in place of training all weights. Imports no torch at its top: `plan` reads the params."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.settings.strict import Strict
from stages.lib.formulas.bounds import Scale

if TYPE_CHECKING:
    from torch import nn


class LoraParams(Strict):
    """Low-rank adapters in place of training all weights (Hu et al., 2022)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the matrices that are added."""
    alpha: Scale = 32.0
    """What they add is multiplied by alpha / rank."""
    target_modules: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Names of the backbone's linear layers that get one. null: all of them."""


def sharing_weights(model: nn.Module) -> Any:
    """Another model of the same layers with the very same weights: what is trained in it must be added to it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def with_adapter(model: Any, lora: LoraParams, seed: int, task: str) -> Any:
    """The model frozen under a fresh adapter, which is the same in every process and every memory layout."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules or "all-linear",
        task_type=task,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def require_layers(backbone: nn.Module, names: list[str]) -> None:
    """Raises `DataError` if one of the names is that of no linear layer; peft would pass over it while others are found."""
    from torch import nn

    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    problems = [
        Problem("params.lora.target_modules", f"the model has no linear layer '{name}'", did_you_mean(name, known))
        for name in names
        if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]
    if problems:
        raise DataError(*problems)
