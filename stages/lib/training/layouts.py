"""Memory layouts: DeepSpeed configs, read, and completed with what the recipe decides. Imports no torch at its top."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PathError, Problem, RecipeError, did_you_mean, shown
from pipeline.settings.paths import holds_file, read_json
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from stages.lib.training.params import Batch, OptimizerParams

LAYOUTS = CHECKOUT / "ds_configs"

DECIDED_BLOCKS = {
    "optimizer": "the stage's learning_rate, weight_decay and adam_* params",
    "scheduler": "the stage's schedule and warmup_steps params",
    "amp": "the stage's param precision",
    "checkpoint": "Slipway, which writes and proves checkpoints itself",
    "nebula": "Slipway, which writes and proves checkpoints itself",
    "datastates_ckpt": "Slipway, which writes and proves checkpoints itself",
}
"""Blocks of a DeepSpeed config that would decide what the recipe decides, and what does so in a recipe."""


def layout_path(name: str) -> Path:
    """The file of a memory layout: a name in ds_configs/ or the path of a file. Raises `RecipeError` if there is none."""
    packaged = {path.stem: path for path in LAYOUTS.glob("*.json")}
    if path := packaged.get(name) or (Path(name) if holds_file(Path(), name) else None):
        return path
    known = sorted(packaged)
    raise RecipeError(
        Problem("resources.deepspeed", f"there is no memory layout {name!r} in ds_configs/", did_you_mean(name, known))
    )


def read_layout(name: str) -> dict[str, Any]:
    """The DeepSpeed config of a memory layout. Raises `RecipeError` if it cannot be read."""
    path, hint = layout_path(name), "Compare with ds_configs/zero2.json."
    try:
        layout = read_json(path)
    except PathError as error:
        raise RecipeError(*error.problems) from None
    zero = layout.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(Problem(str(path), f"its zero_optimization is {shown(zero)}, and not a mapping", hint))
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(name, {}), dict):
            what = f"its zero_optimization.{name} is {shown(zero[name])}, and not a mapping with a `device`"
            raise RecipeError(Problem(str(path), what, "Compare with ds_configs/zero3_offload.json."))
    return layout


def zero_stage_of(layout: Mapping[str, Any] | None) -> int:
    """The ZeRO stage of a DeepSpeed config, 0 without one."""
    block = (layout or {}).get("zero_optimization", {})
    stage = block.get("stage", 0) if isinstance(block, Mapping) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise RecipeError(Problem("resources.deepspeed", f"zero_optimization.stage is {stage!r}", "Take 0, 1, 2 or 3."))
    return int(stage)


def zero_stage(resources: Resources) -> int:
    """The ZeRO stage of the memory layout, 0 without one."""
    return zero_stage_of(None if resources.deepspeed is None else read_layout(resources.deepspeed))


def decisions(params: OptimizerParams, batch: Batch) -> dict[str, Any]:
    """Dotted field of a DeepSpeed config -> the value that the recipe gives it."""
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": params.max_gradient_norm,
        "bf16.enabled": params.precision == "bf16",
        "bf16.check_grad_overflow": True,  # a step whose gradients are not finite is never taken
        "fp16.enabled": params.precision == "fp16",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def layout_problems(layout: Mapping[str, Any], params: OptimizerParams, batch: Batch) -> list[Problem]:
    """What in a DeepSpeed config contradicts the recipe, which would be trained otherwise than it says."""
    problems = [
        Problem("resources.deepspeed", f"its block '{name}' is decided by {by}", "Remove the block from the file.")
        for name, by in DECIDED_BLOCKS.items()
        if layout.get(name) not in (None, {}, {"enabled": False})
    ]
    for field, value in decisions(params, batch).items():
        found = value_at(layout, field)
        same = found == value and isinstance(found, bool) == isinstance(value, bool)
        if found is not None and found != "auto" and not same:
            problems.append(
                Problem(
                    "resources.deepspeed",
                    f"its {field} is {json.dumps(found)}, and the recipe makes it {json.dumps(value)}",
                    f'Write "auto" in the file: the recipe decides {field}.',
                )
            )
    return problems


def value_at(layout: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field, None where there is none."""
    value: Any = layout
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def complete_layout(resources: Resources, params: OptimizerParams, batch: Batch) -> dict[str, Any] | None:
    """The DeepSpeed config with everything that the recipe decides, whatever the file left out; None without a layout.

    Raises `RecipeError` with all that contradicts the recipe. What depends on the model's width stays "auto":
    `fit_to_width`.
    """
    if resources.deepspeed is None:
        return None
    layout = copy.deepcopy(read_layout(resources.deepspeed))
    zero_stage_of(layout)
    if problems := layout_problems(layout, params, batch):
        raise RecipeError(*problems)
    for field, value in decisions(params, batch).items():
        *parents, name = field.split(".")
        block = layout
        for parent in parents:
            block = block.setdefault(parent, {})
        block[name] = value
    return layout


def fit_to_width(layout: Mapping[str, Any] | None, hidden_size: int) -> dict[str, Any] | None:
    """The layout with its buckets sized for a model of this width, where the file says "auto".

    The sizes are those that transformers derives. They change memory and time, and nothing that is computed.
    """
    if layout is None:
        return None
    fitted: dict[str, Any] = copy.deepcopy(dict(layout))
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    block = fitted.get("zero_optimization", {})
    block.update({name: size for name, size in sizes.items() if block.get(name) == "auto"})
    return fitted


@contextlib.contextmanager
def split_while_loading(layout: Mapping[str, Any] | None) -> Iterator[None]:
    """Within it, models that are loaded are split over the processes at once if the layout is ZeRO-3."""
    if zero_stage_of(layout) != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers looks for this object, which it does not keep alive itself.
    config = HfDeepSpeedConfig(dict(layout or {}))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config
