"""Memory layouts: DeepSpeed configs, read, and completed with what the recipe decides. Imports no torch at its top."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PathError, Problem, RecipeError, did_you_mean, shown
from pipeline.settings.paths import holds_file, read_json
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from pipeline.stage import Context
from stages.lib.training.params import Batch, OptimizerParams

LAYOUTS = CHECKOUT / "ds_configs"


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
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        what = f"its zero_optimization is {shown(zero)}, and not a mapping whose `stage` is 0, 1, 2 or 3"
        raise RecipeError(Problem(str(path), what, hint))
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(name, {}), dict):
            what = f"its zero_optimization.{name} is {shown(zero[name])}, and not a mapping with a `device`"
            raise RecipeError(Problem(str(path), what, "Compare with ds_configs/zero3_offload.json."))
    return layout


def zero_stage(resources: Resources) -> int:
    """The ZeRO stage of the memory layout, 0 without one."""
    if resources.deepspeed is None:
        return 0
    return int(read_layout(resources.deepspeed).get("zero_optimization", {}).get("stage", 0))


def complete_layout(ctx: Context, params: OptimizerParams, batch: Batch, hidden_size: int) -> dict[str, Any] | None:
    """The DeepSpeed config with everything that the recipe decides filled in, or None without a layout."""
    if ctx.resources.deepspeed is None:
        return None
    layout = copy.deepcopy(read_layout(ctx.resources.deepspeed))
    decided: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": params.max_gradient_norm,
        "bf16.enabled": params.precision == "bf16",
        "fp16.enabled": False,
        # As the Trainer of transformers derives them.
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for path, value in decided.items():
        *parents, name = path.split(".")
        block = layout
        for parent in parents:
            block = block.get(parent, {})
        if block.get(name) == "auto":
            block[name] = value
    return layout


def zero_stage_of(layout: Mapping[str, Any] | None) -> int:
    return int((layout or {}).get("zero_optimization", {}).get("stage", 0))


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
