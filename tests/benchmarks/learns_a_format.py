"""Whether PPO, GRPO, RLOO and online DPO learn a form that a program checks: `python -m tests.benchmarks.learns_a_format`.

A Llama of 50,000 random weights must write an opening and a closing bracket, in this order, and end by itself. One of the
three gives a third of the reward. At random, about one in ten is fulfilled. Each algorithm must come from under 0.2 to over
0.9 of the highest reward on held-out prompts, with three seeds of three, and in no rollout may the divergence from the
random policy exceed the stated target. Prints a line per run; exits with 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.distributed.training_world import make_tokenizer, write_chats, write_model
from tests.integration.preference_world import run

KL_TARGET = 20.0
"""Nats per completion. To write one token for certain where all 384 are equally likely costs log 384 = 5.9 nats; the three
that are asked for 17.9, if nothing else is written."""
START, GOAL = 0.2, 0.9

COMMON: dict[str, Any] = {
    "rewards": [{"kind": "format", "parts": ["(", ")"], "partial_credit": True}],
    "rollout_batch_size": 64,
    "global_batch_size": 32,
    "max_prompt_tokens": 64,
    "max_new_tokens": 12,
    "learning_rate": 2e-3,
    # Once every completion is worth the same, whitened advantages are noise of the usual size: small steps then, and few.
    "schedule": "cosine",
    "max_policy_kl": 0.1,
    "heldout_prompts": 8,
}
OWN: dict[str, dict[str, Any]] = {
    "ppo": {"rollouts": 60, "kl_coefficient": 0.02},
    "grpo": {
        "rollouts": 120,
        "rollout_batch_size": 128,
        "global_batch_size": 64,
        "kl_coefficient": 0.05,
        "completions_per_prompt": 8,
        "epochs_per_rollout": 2,
    },
    "rloo": {"rollouts": 120, "kl_coefficient": 0.02, "completions_per_prompt": 8, "epochs_per_rollout": 2},
    # As many completions as in grpo, of which a quarter is learned from, twice: 16 pairs a rollout.
    "online_dpo": {
        "rollouts": 120,
        "rollout_batch_size": 128,
        "global_batch_size": 8,
        "kl_coefficient": 0.15,
        "completions_per_prompt": 8,
        "epochs_per_rollout": 2,
    },
}


def learn(kind: str, seed: int, folder: Path, threads: int) -> bool:
    """Runs one stage and prints what came of it; whether it reached the goal."""
    stage = importlib.import_module(f"stages.alignment.{kind}").STAGE
    inputs = {"model": folder / "model", "prompts": folder / "chats"}
    started = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        result, context = run(
            stage,
            inputs,
            {**COMMON, **OWN[kind]},
            folder / f"{kind}-{seed}",
            resources={"threads": threads, "log_every_steps": 10**9, "save_every_steps": 10**9},
            seed=seed,
        )
    seconds = time.monotonic() - started
    highest_kl = max(event["kl"] for event in context.journal.events("rollout"))
    before, after = result.metrics["heldout_reward_base"], result.metrics["heldout_reward"]
    reached = before < START and after > GOAL and highest_kl < KL_TARGET
    print(
        f"{kind}  seed {seed}  reward {before:.3f} -> {after:.3f}  KL at most {highest_kl:.1f}, at the end"
        f" {result.metrics['heldout_kl']:.1f} (target {KL_TARGET:.0f})  {seconds:.0f} s  {'' if reached else 'FAILED'}",
        flush=True,
    )
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--kinds", nargs="+", choices=OWN, default=[*OWN], help="which stages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", make_tokenizer(), tie_word_embeddings=True)
        write_chats(folder / "chats")
        reached = [
            learn(kind, seed, folder, options.threads) for kind in options.kinds for seed in range(options.seeds)
        ]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
