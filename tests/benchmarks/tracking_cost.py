"""How much longer a training takes that is shown on trackers whose servers refuse, or keep files.

    python tests/benchmarks/tracking_cost.py [--steps 150] [--rounds 3]

wants `pip install -c constraints.txt -e '.[trackers]'`. Trains a small model on one process with one thread, in turn without
trackers, with wandb and mlflow whose servers refuse connections, and with TensorBoard and wandb offline. Printed per side: the
median over rounds of the seconds of all steps after the first, by the journal, and their ratio to the side without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE = """
name: cost
outputs: [base]
resources: {device: cpu, threads: 1, log_every_steps: 1, save_every_steps: 1000000}
stages:
  rows: {kind: clean, params: {format: text, max_rows: 300, source: {kind: python_docs, packages: [json, email, logging]}}}
  text: {kind: mix, inputs: {sources: {docs: rows}}, params: {heldout_fraction: 0.2, max_heldout_rows: 4}}
  tokenizer: {kind: tokenizer, inputs: {text: text}, params: {vocabulary_size: 1000}}
  tokens: {kind: pack, inputs: {text: text, tokenizer: tokenizer}, params: {sequence_length: 128}}
  base:
    kind: pretrain
    inputs: {tokens: tokens}
    params:
      objective: causal
      architecture:
        {model_type: llama, hidden_size: 256, intermediate_size: 704, num_hidden_layers: 4, num_attention_heads: 4,
         num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}
      global_batch_size: 16
      learning_rate: 1e-3
      max_steps: STEPS
"""


def run(recipe: Path, store: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(recipe), "--store", str(store), *arguments],
        cwd=CHECKOUT, env={**clean, "DS_ACCELERATOR": "cpu", **(environment or {})}, check=True, capture_output=True,
    )  # fmt: skip


def seconds_of_steps(store: Path) -> float:
    (journal,) = store.glob("work/base-*/journal.jsonl")
    steps = [event for event in map(json.loads, journal.read_text().splitlines()) if event["event"] == "step"]
    return float(steps[-1]["time"] - steps[0]["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"none": [], "refused": [], "files": []}
    with tempfile.TemporaryDirectory() as name, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        place = f"http://127.0.0.1:{taken.getsockname()[1]}"
        sides = {
            "none": {},
            "refused": {"wandb": {}, "mlflow": {"uri": place}},
            "files": {"tensorboard": {}, "wandb": {"mode": "offline"}},
        }
        folder = Path(name)
        recipe, prepared = folder / "recipe.yaml", folder / "prepared"
        recipe.write_text(RECIPE.replace("STEPS", str(options.steps)))
        run(recipe, prepared, "--until", "tokens")
        for _ in range(options.rounds):
            for side, tracking in sides.items():
                store = folder / side
                shutil.copytree(prepared, store)
                environment = {"WANDB_BASE_URL": place, "WANDB_API_KEY": "0" * 40}
                run(recipe, store, "--set", f"tracking={json.dumps(tracking)}", environment=environment)
                found[side].append(seconds_of_steps(store))
                shutil.rmtree(store)
    without = statistics.median(found["none"])
    for side, seconds in found.items():
        each = ", ".join(f"{value:.1f}" for value in seconds)
        print(
            f"{side:8} {statistics.median(seconds):7.2f} s ({each})  ratio {statistics.median(seconds) / without:.4f}"
        )


if __name__ == "__main__":
    main()
