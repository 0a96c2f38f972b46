"""Where and how a step runs: processes, memory layout, device, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.settings.strict import CHECKOUT, OutsideFile, Reading, Strict

LAYOUTS = CHECKOUT / "ds_configs"


class Resources(Strict):
    """Where and how a step runs. Nothing here changes what is trained, so nothing here is part of an artifact's id."""

    launcher: str = "local"
    """How the job becomes processes: local, torchrun or deepspeed."""
    processes: int = Field(default=1, ge=1)
    """Processes per node: one per GPU, or on a CPU as many as share the work."""
    nodes: int = Field(default=1, ge=1)
    """Number of machines."""
    hostfile: OutsideFile | None = None
    """DeepSpeed's hostfile (`host slots=8` lines), needed for more than one node with the deepspeed launcher."""
    rendezvous: str | None = None
    """`host:port` of the first node, needed for more than one node with torchrun."""
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
    """CPU threads per process. None: the machine's cores divided by the processes."""
    save_every_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many complete checkpoints stay on disk while the step runs."""
    log_every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between lines of the journal."""
    keep_failed_output: bool = False
    """Whether what a step had written stays in its work folder when its gate fails or its result is not fit to publish: a whole model, for you to look at."""

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes


def find_layout(name: str, context: Reading) -> Path | None:
    """The DeepSpeed config that `name` means: one of ds_configs/ by its name, or a path. None if there is none.

    Raises `PathError` if the path leads to something else than a file.
    """
    packaged = {path.stem: path for path in LAYOUTS.glob("*.json")}
    return packaged.get(name) or (context.find_file(name) if name.endswith(".json") else None)
