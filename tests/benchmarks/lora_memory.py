"""Prints the peak memory of a ppo run that trains low-rank adapters, and of one that trains all weights, and their ratio.

    python tests/benchmarks/lora_memory.py [--hidden 640] [--layers 8]

Each runs in a process of its own on the CPU, on a model so large that weights outweigh activations. Peak memory is the
largest resident set less the one after all libraries were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_one(folder: Path, model: Path, prompts: Path, lora: bool) -> None:
    """Prints the peak memory of a run of one rollout, and of this process before it."""
    from stages import STAGES
    from stages.lib.on_policy import setup as on_policy_stage
    from tests.integration.preference_world import run

    assert on_policy_stage, "loaded here, so that it belongs to what was there before"
    params = {
        "rewards": [{"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1}],
        "rollouts": 1,
        "rollout_batch_size": 4,
        "global_batch_size": 2,
        "max_prompt_tokens": 64,
        "max_new_tokens": 8,
        "learning_rate": 1e-4,
        "heldout_prompts": 2,
        **({"adapter": {"method": "lora", "rank": 16}} if lora else {}),
    }
    before = peak_bytes()
    resources = {"micro_batch_size": 1, "save_every_steps": 1000}
    run(STAGES["ppo"], {"model": model, "prompts": prompts}, params, folder, resources=resources)
    print(json.dumps({"before": before, "peak": peak_bytes()}))


def measured(folder: Path, model: Path, prompts: Path, *, lora: bool) -> int:
    """Bytes that the run took at most, more than the libraries."""
    command = [sys.executable, __file__, "--run", str(folder), str(model), str(prompts), *(["--lora"] * lora)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak"] - found["before"])


def environment() -> dict[str, str]:
    # Memory that is freed goes back to the system at once, or the peak would be that of the allocator.
    settings = {"PYTHONPATH": str(CHECKOUT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {
        **os.environ,
        **settings,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_one(*options.run, lora=options.lora)
        return

    sys.path.insert(0, str(CHECKOUT))
    from tests.distributed.training_world import make_tokenizer, write_chats, write_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = {"num_attention_heads": 10, "num_key_value_heads": 10}
        sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
        model = write_model(
            folder / "model",
            make_tokenizer(),
            num_hidden_layers=options.layers,
            **sizes,
            **heads,
            tie_word_embeddings=True,
        )
        prompts = write_chats(folder / "chats")
        weights = (model / "model.safetensors").stat().st_size
        print(f"the model: {weights / 4e6:.1f} million parameters, {weights / 2**20:,.0f} MiB")
        peaks = {lora: measured(folder / f"lora-{lora}", model, prompts, lora=lora) for lora in (False, True)}
    print(f"all weights: {peaks[False] / 2**20:,.0f} MiB at most, {peaks[False] / weights:.1f} times the model")
    print(f"adapters:    {peaks[True] / 2**20:,.0f} MiB at most, {peaks[True] / weights:.1f} times the model")
    print(f"ratio:       {peaks[True] / peaks[False]:.0%}")


if __name__ == "__main__":
    main()
