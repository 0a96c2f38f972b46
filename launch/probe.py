"""What `slipway doctor` runs in processes of their own, because it loads torch.

`python -m launch.probe devices` prints what torch finds on this machine as a line of JSON.
`torchrun --nproc-per-node=2 -m launch.probe ranks BACKEND` adds up the ranks over all processes; rank 0 prints the sum.
`launch.probe together BACKEND FOLDER`, a process on each of several nodes: do all see the folder, and how fast do they exchange numbers?
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 90
ANSWER = "answer.json"
SEEING_SECONDS = 40.0
"""How long nodes may take to see each other's files: NFS remembers for up to a minute what a folder did not hold."""
REDUCED_BYTES = 64 * 2**20
ROUNDS = 6
"""All-reduces, of which the first is not counted."""


def devices() -> dict[str, Any]:
    """The torch that is installed, what it was built for, and the CUDA devices it finds."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "devices": found,
        "bfloat16": bool(found) and torch.cuda.is_bf16_supported(),
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def ranks(backend: str) -> dict[str, Any]:
    """The sum of all ranks, and how many there are. Raises what `torch.distributed` raises."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    total = torch.tensor([dist.get_rank()], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    result = {"rank": dist.get_rank(), "size": dist.get_world_size(), "sum": int(total.item())}
    dist.destroy_process_group()
    return result


def together(backend: str, folder: Path) -> None:
    """Writes to the folder what the processes see of each other and of it. Raises what `torch.distributed` raises."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    rank, size = dist.get_rank(), dist.get_world_size()
    (folder / f"seen-{rank}").write_text(socket.gethostname(), encoding="utf-8")
    dist.barrier()
    found: list[Any] = [None] * size
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU asked for"
    mine: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "seen": count_seen(folder, size),
        "runs": {"torch": torch.__version__, "Python": sys.version.split()[0], "device": what},
    }
    dist.all_gather_object(found, mine)
    speed = all_reduce_speed(torch.ones(REDUCED_BYTES // 4, device=device), size) if size > 1 else 0.0
    answer = {
        "backend": backend,
        "hosts": [each["host"] for each in found],
        "seen": [each["seen"] for each in found],
        "runs": {name: [each["runs"][name] for each in found] for name in mine["runs"]},
        "bytes_per_second": speed,
    }
    if rank == 0:
        partial = folder / f"{ANSWER}.part"
        partial.write_text(json.dumps(answer), encoding="utf-8")
        partial.replace(folder / ANSWER)
    dist.barrier()
    dist.destroy_process_group()


def count_seen(folder: Path, size: int) -> int:
    """How many ranks' files are there; filesystems on a network take a while to show what another node wrote."""
    until = time.monotonic() + SEEING_SECONDS
    while (count := len(list(folder.glob("seen-*")))) < size and time.monotonic() < until:
        time.sleep(0.1)
    return count


def all_reduce_speed(numbers: Any, size: int) -> float:
    """Bytes per second over each process's link: 2 (n - 1) / n of what is reduced, over the time of the median of some.

    Source: the "bus bandwidth" of nccl-tests, doc/PERFORMANCE.md.
    """
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        if numbers.is_cuda:
            torch.cuda.synchronize()
        started = time.monotonic()
        dist.all_reduce(numbers)
        if numbers.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    moved: int = 2 * (size - 1) * numbers.numel() * numbers.element_size() // size
    return moved / sorted(seconds[1:])[(ROUNDS - 1) // 2]


def main(arguments: list[str]) -> int:
    """Prints the answer as the last line of the output; returns the exit code."""
    match arguments:
        case ["devices"]:
            print(json.dumps(devices()))
        case ["ranks", ("gloo" | "nccl") as backend]:
            answer = ranks(backend)
            if answer["rank"] == 0:
                print(json.dumps(answer), flush=True)
        case ["together", ("gloo" | "nccl") as backend, folder]:
            together(backend, Path(folder))
        case _:
            print("usage: python -m launch.probe devices | ranks BACKEND | together BACKEND FOLDER", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
