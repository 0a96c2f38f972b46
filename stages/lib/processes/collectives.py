"""The few things that the processes of one job must agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def together() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_initialized() and dist.get_world_size() > 1


def exchange_device() -> torch.device:
    """Where tensors must be for the process group to exchange them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum over all processes of each value, in double precision."""
    if not together():
        return [float(value) for value in values]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=exchange_device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if not together():
        return flag
    tensor = torch.tensor([int(flag)], device=exchange_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor.item())


def barrier() -> None:
    """Returns once all processes are here."""
    if together():
        any_process(False)


def from_main(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the main process, in all processes; what it raises there is raised in all."""
    if not together():
        return compute()
    packet: list[tuple[bool, object]] = [(True, None)]
    if dist.get_rank() == 0:
        try:
            packet = [(True, compute())]
        except Exception as error:  # raised again below, in every process
            packet = [(False, error)]
    dist.broadcast_object_list(packet, src=0, device=exchange_device())
    done, value = packet[0]
    if not done:
        assert isinstance(value, Exception)
        raise value
    return cast("Value", value)


def from_all(mine: Value) -> list[Value]:
    """What each process gives, in the order of their ranks, in all of them."""
    if not together():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
