"""Memory layouts: DeepSpeed configs, read, and completed with what the recipe decides. Imports no torch at its top."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import MOST_PROBLEMS, PathError, Problem, RecipeError, did_you_mean, shown, shown_path
from pipeline.settings.paths import READABLE_JSON_BYTES, holds_file, read_file, read_json
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from pipeline.stage import Context
from pipeline.store.resumable import Spread, bound_by
from stages.lib.training.layout_blocks import block_problems
from stages.lib.training.layout_checks import WHERE, field_problems, without_what_is_off
from stages.lib.training.layout_fields import FITTED, SET, ZERO
from stages.lib.training.params import Batch, OptimizerParams

LAYOUTS = CHECKOUT / "ds_configs"


def layout_path(name: str) -> Path:
    """The file of a memory layout: a name in ds_configs/ or the path of a file. Raises `RecipeError` if there is none."""
    packaged = {path.stem: path for path in LAYOUTS.glob("*.json")}
    if path := packaged.get(name) or (Path(name) if holds_file(Path(), name) else None):
        return path
    known = sorted(packaged)
    raise RecipeError(Problem(WHERE, f"there is no memory layout {name!r} in ds_configs/", did_you_mean(name, known)))


def read_layout(name: str) -> dict[str, Any]:
    """The DeepSpeed config of a memory layout. Raises `RecipeError` if it cannot be read."""
    path = layout_path(name)
    try:
        layout = read_json(path)
        # Of a name that stands twice only the last value is read, here as in every other reader.
        twice = names_twice(read_file(path, READABLE_JSON_BYTES))
    except PathError as error:
        found = [each for each in error.problems if isinstance(each, Problem)]
        raise RecipeError(*(Problem(WHERE, f"{each.where}: {each.what}", each.hint) for each in found)) from None
    if twice:
        names = ", ".join(shown(each) for each in twice[:MOST_PROBLEMS])
        raise RecipeError(
            Problem(WHERE, f"{shown_path(path)}: names that stand twice in one block: {names}", "Remove one.")
        )
    return layout


def names_twice(content: bytes) -> list[str]:
    """The names that stand twice in one object of a JSON text."""
    found: list[str] = []

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return dict(pairs)

    json.loads(content, object_pairs_hook=read)
    return found


def zero_stage_of(layout: Mapping[str, Any] | None) -> int:
    """The ZeRO stage of a DeepSpeed config, 0 without one."""
    block = (layout or {}).get(ZERO)
    stage = block.get("stage", 0) if isinstance(block, Mapping) else 0 if block is None else None
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise RecipeError(
            Problem(WHERE, f"zero_optimization.stage is {shown(stage)}", "Take 0, 1, 2 or 3, as a number.")
        )
    return stage


def zero_stage(resources: Resources) -> int:
    """The ZeRO stage of the memory layout, 0 without one."""
    return zero_stage_of(None if resources.deepspeed is None else read_layout(resources.deepspeed))


def spread_of_run(ctx: Context) -> Spread:
    """Over what this run is spread. Raises `RecipeError` where its memory layout cannot be read."""
    layout = ctx.resources.deepspeed
    bound = "" if layout is None else bound_by(read_layout(layout))
    return Spread(ctx.world.size, zero_stage(ctx.resources), bound)


def readable_layout(resources: Resources) -> dict[str, Any] | None:
    """The DeepSpeed config as a plan may reckon with it; None without one, and where its fields cannot be read.

    What is wrong with it is said before a step runs, by `layout_problems`; a step that is made already needs no layout.
    """
    try:
        layout = {} if resources.deepspeed is None else read_layout(resources.deepspeed)
        zero_stage_of(layout)
    except RecipeError:
        return None
    return None if resources.deepspeed is None or field_problems(layout) else without_what_is_off(layout)


def decisions(params: OptimizerParams, batch: Batch | None) -> dict[str, Any]:
    """Dotted field of a DeepSpeed config -> the value that the recipe gives it, as far as the batch is known."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sizes = (batch.global_batch_size, batch.micro_batch_size, batch.accumulation) if batch else ()
    return {
        **dict(zip(names, sizes, strict=False)),
        "gradient_clipping": params.max_gradient_norm,
        "bf16.enabled": params.precision == "bf16",
        "bf16.check_grad_overflow": True,  # a step whose gradients are not finite is never taken
        "fp16.enabled": params.precision == "fp16",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def layout_problems(layout: Mapping[str, Any], params: OptimizerParams, batch: Batch | None) -> list[Problem]:
    """What in a DeepSpeed config is no memory layout, or contradicts the recipe, which would be trained otherwise."""
    problems = [*field_problems(layout), *zero_problems(layout, batch), *block_problems(layout, params)]
    for field, value in decisions(params, batch).items():
        found = value_at(layout, field)
        same = found == value and isinstance(found, bool) == isinstance(value, bool)
        if found is not None and found != "auto" and not same:
            problems.append(
                Problem(
                    WHERE,
                    f"its {field} is {json.dumps(found)}, and the recipe makes it {json.dumps(value)}",
                    f'Write "auto" in the file: {field} is decided by {SET[field]}.',
                )
            )
    sent = layout.get("communication_data_type")
    if sent in ("bf16", "fp16") and sent != params.precision:
        what = f'its communication_data_type is "{sent}", which rounds gradients, and precision is {params.precision}'
        hint = f'Write "fp32" in the file, remove it, or write `precision: {sent}` in the recipe.'
        problems.append(Problem(WHERE, what, hint))
    return problems


def zero_problems(layout: Mapping[str, Any], batch: Batch | None) -> list[Problem]:
    """What is wrong with the ZeRO stage, and what of `zero_optimization` DeepSpeed would pass over, or end with."""
    if not isinstance(layout.get(ZERO), Mapping):
        return []
    try:
        stage = zero_stage_of(layout)
    except RecipeError as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    problems = []
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        block = value_at(layout, f"{ZERO}.{name}")
        device = block.get("device") if isinstance(block, Mapping) else None
        if device not in ("cpu", "nvme"):
            continue
        field = f"{ZERO}.{name}"
        least = 3 if device == "nvme" else least
        if stage < least:
            what = f"its {field} has the device {device}, which ZeRO-{stage} does not move anything to"
            problems.append(Problem(WHERE, what, f'Take "stage": {least}, or remove {name} from the file.'))
        if device == "nvme" and not block.get("nvme_path"):
            what = f"its {field} has the device nvme, and no nvme_path"
            problems.append(Problem(WHERE, what, 'Add "nvme_path": the folder of a disk of each machine.'))
    parts, processes = layout[ZERO].get("zero_hpz_partition_size"), batch.processes if batch else 1
    if stage == 3 and isinstance(parts, int | float) and 1 < parts < processes and processes % parts:
        what = f"its {ZERO}.zero_hpz_partition_size is {parts}, which does not divide {processes} processes"
        problems.append(Problem(WHERE, what, "Take a number that does: the processes of one machine."))
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
    layout = read_layout(resources.deepspeed)
    if problems := layout_problems(layout, params, batch):
        raise RecipeError(*problems)
    layout = without_what_is_off(layout)
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
    sizes = (hidden_size * hidden_size, int(0.9 * hidden_size * hidden_size), 10 * hidden_size)
    for field, size in zip(FITTED, sizes, strict=True):
        name = field.rpartition(".")[2]
        if value_at(fitted, field) == "auto":
            fitted[ZERO][name] = size
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
