"""Prints the peak memory of a training of a low-rank adapter, and of one of all weights, and their ratio.

    python tests/benchmarks/adapter_memory.py [sft dpo ppo] [--hidden 640] [--layers 8] [--publish merged]

Each runs in a process of its own on the CPU in fp32, on a model so large that weights outweigh activations. Measured is all
that is resident of the process, weights that are mapped from their file among it, less what was once all libraries were
loaded; it is looked at 200 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 0.005

BLOCK: dict[str, Any] = {"method": "lora", "rank": 16}
FIXED: dict[str, Any] = {"global_batch_size": 1, "max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-4}
PARAMS: dict[str, dict[str, Any]] = {
    "sft": {**FIXED, "max_length_tokens": 64},
    "dpo": {**FIXED, "max_length_tokens": 128},
    "ppo": {
        "rewards": [{"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1}],
        "rollouts": 1,
        "rollout_batch_size": 4,
        "global_batch_size": 2,
        "max_prompt_tokens": 64,
        "max_new_tokens": 8,
        "learning_rate": 1e-4,
        "heldout_prompts": 2,
    },
}
DATA = {"sft": "chats", "dpo": "preferences", "ppo": "prompts"}


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches what the process holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            self.bytes = max(self.bytes, resident_bytes())
            time.sleep(LOOK_SECONDS)


def run_one(stage: str, folder: Path, model: Path, data: Path, publish: str | None) -> None:
    """Prints the peak memory of a run, and that of this process before it."""
    import stages.lib.on_policy.setup
    import stages.lib.training.loop  # noqa: F401 - loaded here, so that it belongs to what was there before
    from stages import STAGES
    from tests.integration.preference_world import run

    chosen = STAGES[stage]
    params = {**PARAMS[stage], "adapter": {**BLOCK, "publish": publish}} if publish else PARAMS[stage]
    before = resident_bytes()
    peak = Peak()
    peak.start()
    run(chosen, {"model": model, DATA[stage]: data}, params, folder, resources={"micro_batch_size": 1})
    peak.ended = True
    peak.join()
    print(json.dumps({"before": before, "peak": peak.bytes}))


def measured(stage: str, folder: Path, model: Path, data: Path, publish: str | None) -> int:
    """Bytes that the run took at most, more than the libraries."""
    command = [sys.executable, __file__, "--publish", publish or "", "--run", stage, *map(str, (folder, model, data))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode != 0:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak"] - found["before"])


def environment() -> dict[str, str]:
    # Memory that is freed goes back to the system at once, or the peak would be that of the allocator.
    settings = {"PYTHONPATH": str(CHECKOUT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    freeing = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return {**os.environ, **settings, **freeing, "CUDA_VISIBLE_DEVICES": ""}


def write_data(stage: str, folder: Path, tokenizer: Any) -> Path:
    from tests.distributed.training_world import write_chats
    from tests.integration.preference_world import as_pair
    from tests.integration.tiny_language_model import write_split
    from tests.rows import preferences

    if stage == "dpo":
        return write_split(folder / "preferences", [as_pair(row) for row in preferences(24)], heldout=4)
    return write_chats(folder / stage, num_chats=16, num_heldout=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="of sft, dpo and ppo; all of them where none is named")
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--publish", default="adapter", help="what becomes of the adapter: adapter or merged")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        stage, *paths = options.run
        run_one(stage, *map(Path, paths), publish=options.publish or None)
        return

    sys.path.insert(0, str(CHECKOUT))
    from tests.distributed.training_world import make_tokenizer, write_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        model = write_model(
            folder / "model",
            tokenizer,
            num_hidden_layers=options.layers,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_attention_heads=10,
            num_key_value_heads=10,
            tie_word_embeddings=True,
        )
        weights = (model / "model.safetensors").stat().st_size
        print(f"the model: {weights / 4e6:.1f} million parameters, {weights / 2**20:,.0f} MiB")
        for stage in options.stages or PARAMS:
            data = write_data(stage, folder, tokenizer)
            full, adapted = (
                measured(stage, folder / f"{stage}-{which}", model, data, which) for which in (None, options.publish)
            )
            for what, peak in (("all weights", full), ("an adapter", adapted)):
                print(f"{stage}, {what}: {peak / 2**20:,.0f} MiB at most, {peak / weights:.1f} times the model")
            print(f"{stage}, ratio: {adapted / full:.0%}", flush=True)


if __name__ == "__main__":
    main()
