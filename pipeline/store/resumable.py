"""Whether a training may resume from a checkpoint under given resources, told from files alone: `plan` asks it before a job
waits in a queue, and the training when it starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.settings.resources import LAYOUTS, Resources
from pipeline.store.durable import read_json

STATE = "slipway.json"
"""What a training adds to its checkpoints: `step`, `total_steps`, `world_size`, `zero_stage` and more; of a
layout that is bound to its checkpoints, `bound` and `layout`.

`needs` lists the steps of other checkpoints without which it is worth nothing: that of the best weights so far.
"""


@dataclass(frozen=True)
class Spread:
    """In how many processes a training runs, and in which memory layout."""

    world_size: int
    zero_stage: int
    bound: str = ""
    """Why its checkpoints are of use in the very same only; "" if they can be converted."""

    def __str__(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes} {self.bound or layout_words(self.zero_stage)}"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself. Stages that train nothing say nothing."""

    world_size: int | None = None
    zero_stage: int | None = None
    total_steps: int | None = None
    unreadable: bool = False
    step: int | None = None
    needs: tuple[int, ...] = ()
    bound: str = ""
    """As that of `Spread`."""
    layout: str = ""
    """The memory layout of one that is bound."""

    @property
    def spread(self) -> Spread | None:
        """Over what it was spread that wrote it, where it says that."""
        if self.world_size is None or self.zero_stage is None:
            return None
        return Spread(self.world_size, self.zero_stage, self.bound)


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
        bound=str(content.get("bound", "")),
        layout=str(content.get("layout", "")),
    )


def whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def spread_of(resources: Resources) -> Spread | None:
    """Over what a step with these resources is spread; None where its memory layout cannot be read."""
    if resources.deepspeed is None:
        return Spread(resources.world_size, 0)
    content = layout_content(resources.deepspeed)
    stage = zero_stage_in(content)
    return None if stage is None else Spread(resources.world_size, stage, bound_by(content))


def layout_content(layout: str | Path) -> Any:
    """What a memory layout says (a name in ds_configs/ or a file); None where it cannot be read."""
    packaged = LAYOUTS / f"{layout}.json"
    try:
        return read_json(packaged if packaged.is_file() else Path(layout))
    except (OSError, ValueError):
        return None


def zero_stage_in(content: Any) -> int | None:
    """The ZeRO stage that a memory layout says; None where it does not."""
    block = content.get("zero_optimization", {}) if isinstance(content, Mapping) else None
    return whole_number(block.get("stage", 0)) if isinstance(block, Mapping) else None


def bound_by(content: Any) -> str:
    """Why the checkpoints of a memory layout cannot be converted; "" if they can."""
    block = content.get("zero_optimization", {}) if isinstance(content, Mapping) else None
    if not isinstance(block, Mapping) or not zero_stage_in(content):
        return "under DeepSpeed without ZeRO"
    offloaded = [block.get(name) for name in ("offload_optimizer", "offload_param")]
    if any(isinstance(each, Mapping) and each.get("device") == "nvme" for each in offloaded):
        return f"under ZeRO-{block['stage']} offloaded to NVMe"
    # Which parameter lies where, DeepSpeed tells of the first in another order than it has.
    switched_on = [name for name in ("round_robin_gradients", "elastic_checkpoint") if block.get(name)]
    return f"under ZeRO-{block['stage']} with {switched_on[0]}" if switched_on else ""


def mismatch(saved: Saved, now: Spread) -> str | None:
    """Why a run spread so cannot go on from the checkpoint; None if it can."""
    if (before := saved.spread) is None or not differs(before, now) or not (before.bound or now.bound):
        return None
    return f"was written by {before}, and this run is {now}: that cannot be converted"


def converted(saved: Saved, now: Spread) -> str:
    """What changes where a run goes on from the checkpoint; "" if it goes on bit for bit."""
    before = saved.spread
    if before is None or before == now:
        return ""
    return f"written by {before}, goes on in {now}: the same within rounding, not bit for bit"


def differs(one: Spread, other: Spread) -> bool:
    """Whether the files of one are not those of the other."""
    if (one.zero_stage, one.bound) != (other.zero_stage, other.bound):
        return True
    return one.world_size != other.world_size and bool(one.zero_stage or one.bound)


def layout_words(stage: int) -> str:
    return f"under ZeRO-{stage}" if stage else "without DeepSpeed"


def obstacle(checkpoint: Path, resources: Resources, step: str) -> str | None:
    """Why the step cannot resume from its checkpoint with these resources, and what to do; None if it can."""
    saved = read_saved(checkpoint)
    start_over = f"to start over, remove {checkpoint.parent}"
    if saved.unreadable:
        return f"its {STATE} cannot be read; {start_over}"
    now = spread_of(resources)
    reason = mismatch(saved, now) if now is not None else None
    if reason is None:
        return None
    return f"it {reason}; to resume, add {way_out(saved, resources, step)}; {start_over}"


def way_out(saved: Saved, resources: Resources, step: str) -> str:
    """The options with which the step resumes."""
    settings, now = {}, spread_of(resources)
    if now is None or (saved.zero_stage, saved.bound) != (now.zero_stage, now.bound):
        settings["deepspeed"] = shlex.quote(saved.layout) if saved.bound else layout_name(saved.zero_stage or 0)
    if saved.bound and saved.world_size and saved.world_size != resources.world_size:
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
    packaged = sorted(path for path in LAYOUTS.glob("*.json") if zero_stage_in(layout_content(path)) == stage)
    return packaged[0].stem if packaged else f"(a layout of ZeRO-{stage})"
