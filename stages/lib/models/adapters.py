"""Adapters in place of training all weights: their params, and the table `ADAPTERS` of how each is put on a model.

Imports no torch at its top: `plan` reads the params.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.settings.strict import Strict
from stages.lib.formulas.bounds import Scale
from stages.lib.formulas.seeds import TORCH_BITS, bounded_seed

if TYPE_CHECKING:
    import torch
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


def lora_config(lora: LoraParams, task: str) -> Any:
    """peft's config of low-rank adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules or "all-linear",
        task_type=task,
    )


ADAPTERS: dict[type[Strict], Callable[[Any, str], Any]] = {LoraParams: lora_config}
"""Params of a method -> what makes peft's config of them and of the task. A new method is its params and a row here."""


def with_adapter(model: Any, adapter: LoraParams, seed: int, task: str) -> Any:
    """The model frozen under a fresh adapter, which is the same in every process and every memory layout.

    Raises `DataError` where the method does not fit the model's layers.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(bounded_seed(seed, TORCH_BITS))
    known = sorted({name.rpartition(".")[2] for name, each in model.named_modules() if is_linear(each)})
    try:
        return get_peft_model(model, ADAPTERS[type(adapter)](adapter, task))
    except ValueError as error:
        what = f"does not fit this model: {str(error).splitlines()[0]:.300}"
        hint = f"Name layers that do: some of {', '.join(known)}."
        raise DataError(Problem("params.lora.target_modules", what, hint)) from error


def is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def require_layers(backbone: nn.Module, names: list[str]) -> None:
    """Raises `DataError` if one of the names is that of no linear layer; peft would pass over it while others are found."""
    layers = [name for name, module in backbone.named_modules() if is_linear(module)]
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    problems = [
        Problem("params.lora.target_modules", f"the model has no linear layer '{name}'", did_you_mean(name, known))
        for name in names
        if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]
    if problems:
        raise DataError(*problems)


ADAPTER_FOLDER = "adapter"
"""Where an artifact keeps the adapter alone."""


def save_adapter(
    adapted_model: Any, state: dict[str, torch.Tensor], base: tuple[str, str | None], folder: Path
) -> None:
    """Writes the adapter alone, with what its base is called: (folder, None), or repository and revision of the hub.

    The same bytes in every process. Without peft's model card, which says nothing.
    """
    config = adapted_model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base
    config.target_modules = sorted(config.target_modules)  # peft holds a set, whose order differs from run to run
    adapted_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
