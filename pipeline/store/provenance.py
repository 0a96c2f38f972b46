"""What besides params and inputs can change the bits of a result: the code, the libraries, the machine.

Recorded in manifests and checkpoints, so that two results that should be equal and are not can be told apart, and a run
that goes on under other versions can say so.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from pipeline.settings.strict import CHECKOUT

RECORDED_LIBRARIES = (
    "torch", "transformers", "deepspeed", "accelerate", "datasets", "datatrove", "tokenizers", "sentencepiece",
    "llmcompressor", "compressed-tensors", "safetensors", "numpy", "pydantic", "icu4py", "py3langid",
    "math-verify", "jsonschema",
)  # fmt: skip


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout; (None, None) where there is no git."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status.strip())


def library_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def machine(device: str) -> dict[str, str]:
    """Python, system, processor, GPUs and threads per process of this process, as far as they can be told.

    `device` is `cpu` or `cuda`. Reads what the system says: nothing is loaded for it.
    """
    found = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": " ".join(filter(None, [platform.system(), platform.machine(), *platform.libc_ver()])),
        "processor": processor(),
        "device": gpus() if device == "cuda" else device,
        "threads_per_process": os.environ.get("OMP_NUM_THREADS", ""),
    }
    return {name: value for name, value in found.items() if value}


def processor() -> str:
    return first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """The kinds of NVIDIA GPUs in this machine; `cuda` where the driver does not say."""
    kinds = {first_value(path / "information", "Model") for path in folder.glob("*")} - {""}
    return ", ".join(sorted(kinds)) or "cuda"


def first_value(file: Path, name: str) -> str:
    """The value of the first `name : value` line of a file of the kernel's; empty if there is none."""
    with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """`torch 2.12.1 -> 2.13.0` for everything that is known of both and differs."""
    return [f"{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value]
