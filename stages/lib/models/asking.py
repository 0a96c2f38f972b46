"""What a model's class is asked before it is called in a way that not every class knows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from pipeline.errors import Problem, RecipeError


def innermost(model: nn.Module) -> nn.Module:
    """The model itself, out of data parallelism, DeepSpeed's engine or peft's adapters around it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from collecting keys and values for a text that is read once; none for one that
    does not know such a thing: neither its forward pass nor, where that hands arguments on, its config.
    """
    inner = innermost(model)
    parameters = inspect.signature(getattr(inner, "forward", inner)).parameters
    hands_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    known = "use_cache" in parameters or (hands_on and hasattr(getattr(inner, "config", None), "use_cache"))
    return {"use_cache": False} if known else {}


def require_attention(auto_class: Any, folder: Path, kernel: str, where: str, hint: str) -> None:
    """Raises `RecipeError` if the class of the model in `folder` has no attention of this kind. No weights are made."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        with torch.device("meta"):
            auto_class.from_config(config, attn_implementation=kernel)
    except (ValueError, ImportError) as error:
        if kernel not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
        what = f"needs the attention {kernel}, which the models of {config.model_type} do not have"
        raise RecipeError(Problem(where, what, hint)) from None
