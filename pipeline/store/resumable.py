"""Whether a training may resume from a checkpoint under given resources, told from files alone: `plan` asks it before a job
waits in a queue, and the training when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.resources import LAYOUTS, Resources
from pipeline.store.durable import read_json

STATE = "slipway.json"
"""What a training adds to its checkpoints: `step`, `total_steps`, `world_size`, `zero_stage` and more.

`needs` lists the steps of other checkpoints without which it is worth nothing: that of the best weights so far.
"""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself. Stages that train nothing say nothing."""

    world_size: int | None = None
    zero_stage: int | None = None
    total_steps: int | None = None
    unreadable: bool = False
    step: int | None = None
    needs: tuple[int, ...] = ()


def read_saved(checkpoint: Path) -> Saved:
    try:
        content = read_json(checkpoint / STATE)
    except FileNotFoundError:
        return Saved()
    except (OSError, ValueError):
        return Saved(unreadable=True)
    if not isinstance(content, dict):
        return Saved(unreadable=True)
    names = ("world_size", "zero_stage", "total_steps", "step")
    processes, stage, total, step = (whole_number(content.get(name)) for name in names)
    needs = content.get("needs", [])
    steps = [whole_number(each) for each in needs] if isinstance(needs, list) else [None]
    return Saved(
        processes,
        stage,
        total,
        unreadable=processes is None or stage is None or None in steps,
        step=step,
        needs=tuple(each for each in steps if each is not None),
    )


def whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def zero_stage_of(layout: str | Path | None) -> int | None:
    """The ZeRO stage of a memory layout (a name in ds_configs/ or a file), 0 without one; None where it does not say."""
    if layout is None:
        return 0
    packaged = LAYOUTS / f"{layout}.json"
    try:
        content = read_json(packaged if packaged.is_file() else Path(layout))
    except (OSError, ValueError):
        return None
    block = content.get("zero_optimization", {}) if isinstance(content, Mapping) else None
    return whole_number(block.get("stage", 0)) if isinstance(block, Mapping) else None


def mismatch(saved: Saved, zero_stage: int, world_size: int) -> str | None:
    """Why a run in these processes and this memory layout cannot go on from the checkpoint; None if it can.

    DeepSpeed keeps a part of the optimizer's state per process, cut as the ZeRO stage says: neither can change.
    """
    if saved.zero_stage is None or saved.world_size is None:
        return None
    if saved.zero_stage != zero_stage:
        return f"was written {layout_words(saved.zero_stage)}, and this run is {layout_words(zero_stage)}"
    if zero_stage and saved.world_size != world_size:
        return f"was written by {saved.world_size} processes under ZeRO, and this run has {world_size}"
    return None


def layout_words(stage: int) -> str:
    return f"under ZeRO-{stage}" if stage else "without DeepSpeed"


def obstacle(checkpoint: Path, resources: Resources, step: str) -> str | None:
    """Why the step cannot resume from its checkpoint with these resources, and what to do; None if it can."""
    saved = read_saved(checkpoint)
    start_over = f"to start over, remove {checkpoint.parent}"
    if saved.unreadable:
        return f"its {STATE} cannot be read; {start_over}"
    stage = zero_stage_of(resources.deepspeed)
    reason = mismatch(saved, stage, resources.world_size) if stage is not None else None
    if reason is None:
        return None
    return f"it {reason}; to resume, add {way_out(saved, resources, step)}; {start_over}"


def way_out(saved: Saved, resources: Resources, step: str) -> str:
    """The options with which the step resumes."""
    settings = {}
    if saved.zero_stage != zero_stage_of(resources.deepspeed):
        settings["deepspeed"] = layout_name(saved.zero_stage or 0)
    if saved.zero_stage and saved.world_size and saved.world_size != resources.world_size:
        processes, rest = divmod(saved.world_size, resources.nodes)
        if rest:
            settings["nodes"], processes = "1", saved.world_size
        settings["processes"] = str(processes)
        if resources.launcher == "local" and saved.world_size > 1:
            settings["launcher"] = "torchrun"
    return " ".join(f"--set stages.{step}.resources.{name}={value}" for name, value in settings.items())


def layout_name(stage: int) -> str:
    """The name of a memory layout of this ZeRO stage."""
    if not stage:
        return "null"
    packaged = sorted(path for path in LAYOUTS.glob("*.json") if zero_stage_of(path) == stage)
    return packaged[0].stem if packaged else f"(a layout of ZeRO-{stage})"
