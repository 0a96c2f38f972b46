"""The blocks `optimizer` and `scheduler` of a DeepSpeed config. The recipe decides both, so that a file may only repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem, shown
from stages.lib.training.layout_checks import WHERE, says_nothing
from stages.lib.training.params import OptimizerParams, TrainingParams

OPTIMIZER = "AdamW"

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}
"""Type of a scheduler, as transformers documents them -> what a recipe calls it."""

Wanted = dict[str, tuple[Any, str]]
"""Field -> (what the recipe makes it, by which param)."""


def block_problems(layout: Mapping[str, Any], params: OptimizerParams) -> list[Problem]:
    """Where the blocks say something else than the recipe, with both values."""
    blocks = {name: layout.get(name) for name in ("optimizer", "scheduler")}
    problems = []
    for name, block in blocks.items():
        if says_nothing(block):
            continue
        if not isinstance(block, Mapping):
            what = f"its {name} is {shown(block)}, and not a mapping"
            problems.append(Problem(WHERE, what, "Remove it from the file."))
            continue
        wanted = of_optimizer(params) if name == "optimizer" else of_scheduler(params)
        problems += [*type_problems(name, block, params), *field_differences(name, block, wanted)]
    return problems


def type_problems(name: str, block: Mapping[str, Any], params: OptimizerParams) -> list[Problem]:
    """What is wrong with the type of a block."""
    found = block.get("type")
    says = f"its {name}.type is {shown(found)}, and the recipe makes it"
    remove = "Remove the block from the file"
    if found == "auto":
        return []
    if name == "optimizer":
        right = found == OPTIMIZER
        return [] if right else [Problem(WHERE, f"{says} {OPTIMIZER!r}", f"{remove}, or write that there.")]
    schedule = SCHEDULES.get(found) if isinstance(found, str) else None
    if schedule == params.schedule:
        return []
    hint = f"{remove}, or write `schedule: {schedule}` in the recipe." if schedule else f"{remove}."
    return [Problem(WHERE, f"{says} schedule: {params.schedule}", hint)]


def field_differences(name: str, block: Mapping[str, Any], wanted: Wanted) -> list[Problem]:
    """What stands in a block beside its type and differs from the recipe, or is not known."""
    beside = {each: value for each, value in block.items() if each not in ("type", "params")}
    given = block.get("params")
    fields = {f"params.{each}": value for each, value in (given if isinstance(given, Mapping) else {}).items()} | beside
    if given is not None and not isinstance(given, Mapping):
        fields["params"] = given
    problems = []
    for field, value in fields.items():
        if value == "auto" or says_nothing(value):
            continue
        right, param = wanted.get(field.removeprefix("params."), (None, ""))
        if not param:
            what, hint = f"its {name}.{field} is no field that is read here", "Remove it from the file."
            problems.append(Problem(WHERE, what, hint))
        elif value != right or isinstance(value, bool) != isinstance(right, bool):
            what = f"its {name}.{field} is {shown(value)}, and the recipe makes it {shown(right)}"
            problems.append(Problem(WHERE, what, f'Write "auto" in the file, or {param} in the recipe.'))
    return problems


def of_optimizer(params: OptimizerParams) -> Wanted:
    return {
        "lr": (params.learning_rate, "learning_rate"),
        "betas": ([params.adam_beta1, params.adam_beta2], "adam_beta1 and adam_beta2"),
        "eps": (params.adam_epsilon, "adam_epsilon"),
        "weight_decay": (params.weight_decay, "weight_decay"),
        "torch_adam": (True, "nothing: PyTorch's AdamW is used"),
        "adam_w_mode": (True, "nothing: PyTorch's AdamW is used"),
    }


def of_scheduler(params: OptimizerParams) -> Wanted:
    steps = params.max_steps if isinstance(params, TrainingParams) else None
    return {
        "warmup_min_lr": (0, "nothing: the warmup begins near 0"),
        "warmup_max_lr": (params.learning_rate, "learning_rate"),
        "warmup_num_steps": (params.warmup_steps, "warmup_steps"),
        "warmup_type": ("linear", "nothing: the warmup is linear"),
        "total_num_steps": (steps, "max_steps"),
    }
