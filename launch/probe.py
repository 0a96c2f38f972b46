"""What `slipway doctor` runs in processes of their own, because it loads torch.

`python -m launch.probe devices` prints what torch finds on this machine as a line of JSON.
`torchrun --nproc-per-node=2 -m launch.probe ranks BACKEND` adds up the ranks over all processes; rank 0 prints the sum.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

TIMEOUT_SECONDS = 90


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


def main(arguments: list[str]) -> int:
    """Prints the answer as the last line of the output; returns the exit code."""
    match arguments:
        case ["devices"]:
            print(json.dumps(devices()))
        case ["ranks", ("gloo" | "nccl") as backend]:
            answer = ranks(backend)
            if answer["rank"] == 0:
                print(json.dumps(answer), flush=True)
        case _:
            print("usage: python -m launch.probe devices | ranks gloo | ranks nccl", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
