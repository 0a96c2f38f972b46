"""How the processes of one job find each other, and where their tensors live."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers

from pipeline.errors import LaunchError, Problem
from pipeline.settings.resources import Resources
from pipeline.stage import Context
from stages.lib.processes.collectives import barrier

COLLECTIVE_MARGIN_SECONDS = 30
"""How much longer a process waits in a collective than `slipway run`, which can say who it waits for."""
NEVER = timedelta(days=3650)


def device_type(resources: Resources) -> str:
    """`cpu` or `cuda`. Raises `LaunchError` if the recipe asks for a device that is not there."""
    if resources.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if resources.device == "cuda":
        raise LaunchError(
            Problem("resources.device", "is cuda, and torch finds no CUDA device", "Run `slipway doctor`, or take cpu.")
        )
    return "cpu"


def quiet() -> None:
    """Keeps other libraries' progress bars and repeated advice off the console; errors still come through."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    for name in ("DeepSpeed", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def use_threads(resources: Resources) -> None:
    """Fixes the number of CPU threads, which results depend on, and turns denormal numbers, which are slow, into zeros."""
    torch.set_num_threads(resources.threads_per_process)
    torch.set_flush_denormal(True)


def join_processes(ctx: Context) -> torch.device:
    """This process's device, after all processes of the job have found each other.

    A job of one process started without torchrun joins a group of one when DeepSpeed, which insists on a group, is used.
    """
    quiet()
    kind = device_type(ctx.resources)
    device = torch.device("cuda", ctx.world.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Accelerate would say cpu:0, where torch cannot load an optimizer to.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    use_threads(ctx.resources)
    # An environment, or an earlier run in this process, must not bring in a memory layout that the recipe does not name.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if not dist.is_initialized() and (ctx.world.size > 1 or ctx.resources.deepspeed is not None):
        start_process_group(ctx, "nccl" if kind == "cuda" else "gloo")
    if ctx.resources.deepspeed is not None:
        import deepspeed

        if kind == "cpu":
            # Or every first run compiles a shared-memory all-reduce, for minutes, with a compiler that may not be there.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It must know the group before ZeRO-3 reads a model, or it takes every process for alone.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return device


def start_process_group(ctx: Context, backend: str) -> None:
    """Waits for all processes of the job."""
    if ctx.world.size == 1:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    dist.init_process_group(
        backend,
        rank=ctx.world.rank,
        world_size=ctx.world.size,
        timeout=collective_timeout(ctx.resources),
    )


def collective_timeout(resources: Resources) -> timedelta:
    """How long a process waits for the others before it gives up."""
    limit = resources.hang_timeout_seconds
    return NEVER if limit is None else timedelta(seconds=limit + COLLECTIVE_MARGIN_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave_processes() -> None:
    """Ends the process group, if there is one, after everyone is done."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
