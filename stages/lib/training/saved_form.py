"""Whether a file of a checkpoint holds what an engine writes into it: its keys, and the shapes of its tensors.

It is asked before anything is loaded, of files that are mapped: no tensor's data is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

GROUP_NUMBERS = ("lr", "eps", "weight_decay")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter beside the number of its steps: tensors of the parameter's shape."""


class Weights(dict[str, Size]):
    """Name -> shape of weights that must be there, and no others."""


@dataclass(frozen=True)
class SteppedTensors:
    """What an AdamW steps."""

    groups: tuple[int, ...]
    """How many tensors are in each of its groups."""
    shapes: tuple[Size, ...]
    """Those of all groups, one after the other."""
    from_the_first: bool
    """Whether the first step leaves moments behind: one in fp16 may be left out."""


def content_problem(saved: Any, wanted: Mapping[str, Any], where: str = "") -> str:
    """What is wrong with what was saved, beside an example of what would be; "" if nothing is.

    All keys of the example must be there, and all of its tensors, with the same shapes. Of weights the example is `Weights`,
    and of an optimizer `SteppedTensors`: one that has made no step has no moments.
    """
    if not isinstance(saved, Mapping):
        return f"{where or 'what it holds'} is no mapping"
    for key, example in wanted.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in saved:
            return f"{name} is missing"
        if problem := value_problem(saved[key], example, name):
            return problem
    return ""


def value_problem(value: Any, example: Any, name: str) -> str:
    """The same of a single value."""
    if isinstance(example, SteppedTensors):
        return optimizer_problem(value, example, name)
    if isinstance(example, Weights):
        return weights_problem(value, example, name)
    if isinstance(example, Mapping):
        return content_problem(value, example, name)
    if isinstance(example, Tensor | Size):
        shape = example.shape if isinstance(example, Tensor) else example
        if not isinstance(value, Tensor):
            return f"{name} is no tensor"
        return "" if value.shape == shape else f"{name} has the shape {list(value.shape)} instead of {list(shape)}"
    if isinstance(example, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(example):
            return f"{name} is no list of {len(example)}"
        found = (value_problem(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(value, example, strict=True)))
        return next(filter(None, found), "")
    if isinstance(example, bool | int | float):
        return "" if holds_one_number(value) else f"{name} is no number"
    return "" if example is None or isinstance(value, type(example)) else f"{name} is no {type(example).__name__}"


def weights_problem(saved: Any, shapes: Weights, where: str) -> str:
    """What is wrong with saved weights."""
    if problem := content_problem(saved, dict(shapes), where):
        return problem
    others = sorted(str(name) for name in set(saved) - set(shapes))
    return f"{where}.{others[0]} is none of this model's" if others else ""


def optimizer_problem(saved: Any, stepped: SteppedTensors, where: str) -> str:
    """What is wrong with the saved state of an AdamW that steps these tensors."""
    if problem := content_problem(saved, {"state": {}, "param_groups": [{}] * len(stepped.groups)}, where):
        return problem
    for index, (group, size) in enumerate(zip(saved["param_groups"], stepped.groups, strict=True)):
        wanted = {**dict.fromkeys(GROUP_NUMBERS, 0.0), "betas": [0.0, 0.0], "params": [0] * size}
        if problem := content_problem(group, wanted, f"{where}.param_groups[{index}]"):
            return problem
    ids = [each for group in saved["param_groups"] for each in group["params"]]
    shapes = dict(zip(ids, stepped.shapes, strict=True))
    if not saved["state"] and stepped.shapes and stepped.from_the_first:
        return f"{where}.state is empty"
    for key, moments in saved["state"].items():
        name = f"{where}.state.{key}"
        if key not in shapes:
            return f"{name} is of no tensor that is stepped"
        if problem := content_problem(moments, {"step": 0, **dict.fromkeys(MOMENTS, shapes[key])}, name):
            return problem
    return ""


def holds_one_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1)
