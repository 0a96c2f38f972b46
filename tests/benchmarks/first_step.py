"""How long a training takes from the start of its process to its first optimizer step, here and in another checkout.

    python tests/benchmarks/first_step.py [--against OTHER_CHECKOUT] [--runs 5]

Each run is a process of its own that trains a tiny model for one step, without DeepSpeed and under ZeRO-2, in both checkouts
in turn. Printed per layout: the median seconds of each, and their ratio; and what `import torch` alone takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
PREPARE = """
import json, sys
from pathlib import Path
from tests.distributed.training_world import LLAMA, Job, make_tokenizer, write_tokens
folder = Path(sys.argv[1])
params = {"global_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "architecture": LLAMA}
tokens = write_tokens(folder / "tokens", make_tokenizer())
for layout in (None, "zero2"):
    resources = {"micro_batch_size": 4, "log_every_steps": 1, "deepspeed": layout}
    job = Job(folder / f"work-{layout}", "stages.language_model.pretrain", params, {"tokens": tokens}, resources)
    (folder / f"{layout}.json").write_text(json.dumps([job.as_json()]))
"""


def environment(checkout: Path) -> dict[str, str]:
    settings = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings}


def seconds_to_first_step(checkout: Path, folder: Path, layout: str) -> float:
    work = folder / f"work-{layout}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    driver = checkout / "tests" / "distributed" / "training_driver.py"
    started = time.time()
    subprocess.run(
        [sys.executable, str(driver), str(folder / f"{layout}.json")],
        env=environment(checkout),
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    events = map(json.loads, (work / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    return next(float(event["time"]) for event in events if event["event"] == "step") - started


def seconds_to_import_torch() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, such as one of an earlier commit")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"here": HERE} | ({"there": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in checkouts}
        for name, checkout in checkouts.items():
            folders[name].mkdir()
            command = [sys.executable, "-c", PREPARE, str(folders[name])]
            subprocess.run(command, env=environment(checkout), cwd=checkout, check=True)
        print(f"import torch: {statistics.median(seconds_to_import_torch() for _ in range(options.runs)):.2f} s")
        for layout in ("None", "zero2"):
            measured: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(options.runs):
                for name, checkout in checkouts.items():
                    measured[name].append(seconds_to_first_step(checkout, folders[name], layout))
            medians = {name: statistics.median(values) for name, values in measured.items()}
            text = ", ".join(f"{name} {median:.2f} s" for name, median in medians.items())
            ratio = f", here / there {medians['here'] / medians['there']:.2f}" if "there" in medians else ""
            print(f"to the first step, layout {layout}: {text}{ratio}")


if __name__ == "__main__":
    main()
