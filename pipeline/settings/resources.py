"""Where and how a step runs: processes, memory layout, device, checkpoints."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.settings.strict import CHECKOUT, Reading, Strict

LAYOUTS = CHECKOUT / "ds_configs"
OF_ONE_PROCESS_TOO = frozenset(
    {"device", "keep_failed_output", "stop_timeout_seconds", "stopped_timeout_seconds", "tracking"}
)
"""What a recipe's common `resources` say to stages that run in one process as well. The rest is for those that may run in several:
a data stage has all cores, however few each of eight processes has.
"""


class Resources(Strict):
    """Where and how a step runs. Nothing here changes what is trained, so nothing here is part of an artifact's id."""

    launcher: str | dict[str, Any] = "local"
    """How the job becomes processes: local, torchrun, deepspeed or, within a SLURM allocation, srun. Where a launcher must be told more: `{kind: torchrun, rendezvous: "first-node:29500"}` or `{kind: deepspeed, hostfile: path}`."""
    processes: int = Field(default=1, ge=1)
    """Processes per node: one per GPU, or on a CPU as many as share the work."""
    nodes: int = Field(default=1, ge=1)
    """Number of machines."""
    deepspeed: str | None = None
    """Memory layout: the name of a file in ds_configs/ (zero1, zero2, zero3, zero3_offload) or the path of one. None: plain data parallelism."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences (or pairs) per process and forward pass. Accumulation is derived: global_batch_size / (micro_batch_size x processes) must be whole. None: no accumulation."""
    generation_batch_size: int | None = Field(default=None, ge=1)
    """Completions per process that stages which train on them write at once. None: as many as micro_batch_size."""
    generation_memory_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of a GPU's memory for vLLM, where a stage generates with it: its weights and its cache, while it is awake."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: about a third more time for much less memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. auto: cuda if this machine has it."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per process. None: the cores that this job may use, divided by the processes."""
    save_every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many complete checkpoints stay on disk while the step runs."""
    keep_last_checkpoint: bool = False
    """Whether the last checkpoint stays when the artifact is made (with that of the best weights, where these are published), so that another step can extend the training. It takes about 16 bytes per parameter, until its folder or the artifact is removed."""
    log_every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between lines of the journal."""
    keep_failed_output: bool = False
    """Whether what a step had written stays in its work folder when its gate fails, its result is not fit to publish or its data are not fit to use: a whole model, say, or rows and tokens, for you to look at."""
    hang_timeout_seconds: int | None = Field(default=1800, ge=1)
    """Seconds without any news from a group of processes, such as a step or a batch, after which it is ended; also how long a process waits for the others in a collective. null: never."""
    stopped_timeout_seconds: int | None = Field(default=300, ge=1)
    """Seconds for which the process of a rank may be held by SIGSTOP, while `slipway run` is not, before the step is ended. null: only `hang_timeout_seconds` counts."""
    stop_timeout_seconds: int | None = Field(default=600, ge=1)
    """Seconds without any news after which a group of processes that was asked to save and stop is ended. null: never."""

    tracking: dict[str, dict[str, Any] | None] = {}
    """Where what a step says is shown: the recipe's `tracking`, unless a step has its own: tensorboard, wandb, mlflow, each with its options."""

    @field_validator("launcher", mode="before")
    @classmethod
    def name_or_mapping(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError(f"must be a launcher's name, or a mapping with its `kind`, not {value!r}")
        return value

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes

    @property
    def uses_cpu(self) -> bool:
        """Whether tensors live on the CPU of this machine."""
        return self.device == "cpu" or (self.device == "auto" and not Path("/dev/nvidiactl").exists())

    @property
    def launcher_name(self) -> str:
        return self.launcher if isinstance(self.launcher, str) else str(self.launcher.get("kind", ""))

    @property
    def launcher_options(self) -> dict[str, Any]:
        """What the recipe tells the launcher, which knows its own fields."""
        return {} if isinstance(self.launcher, str) else {k: v for k, v in self.launcher.items() if k != "kind"}

    @property
    def threads_per_process(self) -> int:
        return self.threads or max(1, usable_cores() // self.processes)


def usable_cores() -> int:
    """The cores that this process may use: those it is bound to, or fewer where its control group grants less time."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, granted_cores())]))


def granted_cores(groups: Path = Path("/sys/fs/cgroup"), listed: Path = Path("/proc/self/cgroup")) -> list[float]:
    """How many cores' time each control group above this process grants, where it sets a limit."""
    try:
        lines = [line.split(":", 2) for line in listed.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            root, names = groups, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = groups / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            if place == root or root in place.parents:
                found += cores_in([place / name for name in names])
    return found


def cores_in(files: list[Path]) -> list[float]:
    """Quota divided by period, in one file (`50000 100000`) or in two; nothing where there is no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return []
    return [cores] if cores > 0 else []


def find_layout(name: str, context: Reading) -> Path | None:
    """The DeepSpeed config that `name` means: one of ds_configs/ by its name, or a path. None if there is none.

    Raises `PathError` if the path leads to something else than a file.
    """
    packaged = {path.stem: path for path in LAYOUTS.glob("*.json")}
    return packaged.get(name) or (context.find_file(name) if name.endswith(".json") else None)
