"""How long `slipway plan` keeps a person waiting, beside what importing torch alone would cost on the same machine.

    python tests/benchmarks/plan_latency.py [--runs 7] [--recipe pipeline/recipes/quickstart.yaml] [--store runs]

The commands take turns, so that a machine whose speed drifts slows all of them; medians and the ratio are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--recipe", default="pipeline/recipes/quickstart.yaml")
    parser.add_argument("--store", default="runs")
    options = parser.parse_args()
    commands = {
        "slipway plan": [sys.executable, "-m", "pipeline", "plan", options.recipe, "--store", options.store],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    for command in commands.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    for name, values in taken.items():
        print(f"{name}: median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f} s")
    pairs = zip(taken["slipway plan"], taken["import torch"], strict=True)
    print(f"slipway plan / import torch: median {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
