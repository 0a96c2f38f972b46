"""Slipway's PPO beside that of TRL 1.12, the last that had one: curves of reward and KL, and completions per second.

    python tests/benchmarks/ppo_against_trl.py [--environment DIR] [--seeds 3] [--rollouts 40] [--threads 1]

Both train the same tiny Llama on the same prompts, for the same rewards, with the same settings, on the CPU. A curve is
a number per rollout: the mean score of its completions (the penalty for a missing end included), or their mean KL from
the reference (k1, summed over tokens). Each is smoothed over `--window` rollouts. Two curves agree at a rollout where
the means over seeds differ by no more than the larger of both sides' spreads, from the lowest to the highest seed; and
they agree if they do at eight rollouts of ten. Exit code 1 if they do not.

The sides take turns, so that a machine whose speed drifts slows both. Completions per second are those of all rollouts
but the first, by the wall clock and, since a busy machine makes that a lottery, by the process's own CPU time.

`--slipway '{"kl_coefficient": 0.2}'` changes settings on Slipway's side alone, to see that the comparison can fail.

What differs and cannot be set alike:

- TRL gives the score of a completion that ended to the place behind its end, where its critic also has a value, and
  Slipway to the token that ends it. Lambda below 1 counts one place more in TRL, so both have 1 here: with 0.95 TRL's
  mean score is about 0.02 higher from the tenth rollout on. Its value loss has a place more.
- TRL whitens advantages by the variance divided by n - 1, Slipway by n; with hundreds of tokens that is a thousandth.
- TRL takes the log-probabilities of the generator for those of the policy; Slipway computes them anew.
- TRL does not clip gradients, whatever `max_grad_norm` says, so Slipway's limit is set out of reach.
- TRL takes a padding token that the policy wrote for the end of the completion. The model here never writes one.
- TRL runs the garbage collector twice in each update. Its gradient checkpointing, on by default, is off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("trl_ppo_runner.py")

TORCH = "torch==2.13.0"
ORACLE = ("trl==1.12.0", "transformers==5.17.0", "accelerate", "datasets", "pydantic", "PyYAML")
"""Everything else as in constraints.txt. The last two are for the functions of stages/lib/rewards.py."""

END = "<|end|>"
SETTINGS: dict[str, Any] = {
    # Every e counts up to the fourth, and so does an end of the policy's own.
    "rewards": [{"kind": "format", "parts": ["e"] * 4, "must_end": True, "partial_credit": True}],
    "missing_end_penalty": 0.2,
    "rollouts": 40,
    "rollout_batch_size": 128,
    "global_batch_size": 64,
    "epochs_per_rollout": 4,
    "max_new_tokens": 12,
    "temperature": 1.0,
    "kl_coefficient": 0.05,
    "kl_estimator": "k1",
    "clip_ratio": 0.2,
    "gamma": 1.0,
    "gae_lambda": 1.0,  # below, TRL's place behind the end makes a difference: see above
    "value_coefficient": 0.1,
    "value_clip": 0.2,
    "whiten_rewards": False,
    "learning_rate": 5e-4,
    "schedule": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
}
"""What both sides are told, in Slipway's words. trl_ppo_runner.py says them in TRL's."""

SLIPWAY_ONLY: dict[str, Any] = {
    "max_gradient_norm": 1e9,
    "max_prompt_tokens": 32,
    "heldout_prompts": 1,
    "journal_samples": 0,
    "publish_critic": False,
}
CURVES = {"reward": "mean score", "kl": "KL per completion in nats"}
ENOUGH = 0.8
"""At how many of the rollouts curves that agree must agree. Of ten seeds of each side, two sets of three of the very same
program agree at nine rollouts of ten in 83 cases of 100, and at eight of ten in 96: neighbours fall apart together. One set
of each program: in 87 and 98."""


@dataclass(frozen=True)
class Run:
    """What one run of either side writes, a number per rollout."""

    reward: list[float]
    kl: list[float]
    wall_seconds: list[float]
    cpu_seconds: list[float]
    """Clocks at the end of each rollout: of the wall, and of the process."""

    def per_second(self, clock: str, completions: int) -> float:
        ticks = getattr(self, clock)
        return completions * (len(ticks) - 1) / (ticks[-1] - ticks[0])


# The environment


def oracle_python(folder: Path) -> Path:
    """The interpreter of an environment with TRL 1.12 in `folder`, which is made unless it is there."""
    python, complete = folder / "bin" / "python", folder / ".complete"
    wanted = " ".join((TORCH, *ORACLE))
    if complete.exists() and complete.read_text() == wanted:
        return python
    print(f"making an environment with {wanted} in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith("trl==")) + "\n")
    # torch first and alone, as in the Makefile.
    for packages in ([TORCH], ORACLE):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
    complete.write_text(wanted)
    return python


# What both are given


def write_world(folder: Path, hidden: int, layers: int) -> tuple[Path, Path, list[list[int]]]:
    """A model that ends some of its completions and never writes padding; chats that ask; the ids of their prompts."""
    from stages.lib.rows.canonical import read_rows
    from stages.lib.text.prompts import encode_prompt_or_text, prompt_of
    from tests.distributed.training_world import make_tokenizer, write_chats, write_model

    tokenizer = make_tokenizer()
    tokenizer.eos_token = END  # TRL knows of one token that ends a completion, and looks for this one
    fields = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    model = write_model(folder / "model", tokenizer, **fields)
    change_head(model / "model.safetensors", tokenizer)
    num_prompts = SETTINGS["rollout_batch_size"]  # each rollout has all of them, on both sides
    chats = write_chats(folder / "chats", num_chats=4 * num_prompts)
    rows = list(read_rows(chats / "train.jsonl"))
    prompts = {index: encode_prompt_or_text(tokenizer, prompt_of(row, "chat")) for index, row in enumerate(rows)}
    kept = [index for index, ids in prompts.items() if len(ids) <= SLIPWAY_ONLY["max_prompt_tokens"]][:num_prompts]
    assert len(kept) == num_prompts
    lines = (chats / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (chats / "train.jsonl").write_text("".join(lines[index] for index in kept), encoding="utf-8")
    return model, chats, [prompts[index] for index in kept]


def change_head(path: Path, tokenizer: Any) -> None:
    """Makes the probability of the end about a fifteenth in all contexts, and that of padding none."""
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    # The first coordinate of the hidden state is the same everywhere, about 2.7, and these rows of the head know no other.
    state["model.embed_tokens.weight"][:, 0] = 0.06
    for token, weight in ((tokenizer.eos_token_id, 1.2), (tokenizer.pad_token_id, -10.0)):
        state["lm_head.weight"][token] = 0.0
        state["lm_head.weight"][token, 0] = weight
    save_file(state, path, metadata={"format": "pt"})


def run_side(interpreter: Sequence[str | Path], spec: dict[str, Any], folder: Path) -> Run:
    """Runs one side in a process of its own."""
    folder.mkdir(parents=True)
    spec = {**spec, "folder": str(folder), "result": str(folder / "result.json")}
    (folder / "spec.json").write_text(json.dumps(spec))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(spec["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    ended = subprocess.run(
        [*interpreter, folder / "spec.json"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(ended.stdout[-3000:] + ended.stderr[-6000:])
    return Run(**json.loads((folder / "result.json").read_text()))


def run_slipway(spec: dict[str, Any]) -> None:
    """One run of the stage, as the worker would run it, with clocks."""
    from stages.alignment.ppo import STAGE
    from stages.lib.on_policy.loop import Aligner
    from tests.integration.preference_world import run

    curves: dict[str, list[float]] = {name: [] for name in Run.__annotations__}
    finish_rollout = Aligner.finish_rollout

    def watched(self: Any, rollout: int) -> Any:
        line = finish_rollout(self, rollout)
        for name, value in (
            ("reward", line["reward"]),
            ("kl", line["kl"]),
            ("wall_seconds", time.perf_counter()),
            ("cpu_seconds", time.process_time()),
        ):
            curves[name].append(value)
        return line

    Aligner.finish_rollout = watched  # type: ignore[method-assign]
    run(
        STAGE,
        {"model": Path(spec["model"]), "prompts": Path(spec["chats"])},
        {**SLIPWAY_ONLY, **spec["settings"]},
        Path(spec["folder"]),
        resources={"threads": spec["threads"], "save_every_steps": 10**9, "log_every_steps": 10**9},
        seed=spec["seed"],
    )
    Path(spec["result"]).write_text(json.dumps(curves))


# The comparison


def smoothed(curve: Sequence[float], window: int) -> list[float]:
    """The mean of each `window` neighbours; shorter than the curve by window - 1."""
    return [statistics.fmean(curve[start : start + window]) for start in range(len(curve) - window + 1)]


def compare(name: str, slipway: Sequence[Run], trl: Sequence[Run], window: int) -> bool:
    """Prints both curves and whether they agree."""
    sides = [[smoothed(getattr(run, name), window) for run in runs] for runs in (slipway, trl)]
    print(f"\n{CURVES[name]}, mean over {window} rollouts: mean of the seeds, lowest to highest")
    print(f"{'rollouts':>9}   {'Slipway':^26}   {'TRL':^26}   difference   spread")
    num_points = len(sides[0][0])
    agreeing, gaps, spreads = 0, [], []
    for point in range(num_points):
        values = [[curve[point] for curve in side] for side in sides]
        means = [statistics.fmean(side) for side in values]
        spread = max(max(side) - min(side) for side in values)
        gap = means[0] - means[1]
        agrees = abs(gap) <= spread
        agreeing += agrees
        gaps.append(gap)
        spreads.append(spread)
        if point % window == 0 or point == num_points - 1:
            shown = [
                f"{mean:8.3f} {min(side):8.3f}..{max(side):<7.3f}" for mean, side in zip(means, values, strict=True)
            ]
            mark = "" if agrees else "  apart"
            print(f"{point + 1:4}-{point + window:<4}   {shown[0]}   {shown[1]}   {gap:+10.3f}   {spread:6.3f}{mark}")
    share = agreeing / num_points
    print(
        f"{name}: agrees at {agreeing} of {num_points} points ({share:.0%}; {ENOUGH:.0%} are asked for);"
        f" mean difference {statistics.fmean(gaps):+.4f}, mean spread {statistics.fmean(spreads):.4f}"
    )
    return share >= ENOUGH


def report_speed(slipway: Sequence[Run], trl: Sequence[Run], completions: int) -> None:
    """Prints completions per second of both sides and their ratio, seed by seed."""
    print()
    for clock, what in (("wall_seconds", "second"), ("cpu_seconds", "second of CPU time")):
        speeds = [[run.per_second(clock, completions) for run in runs] for runs in (slipway, trl)]
        for side, values in zip(("Slipway", "TRL"), speeds, strict=True):
            listed = ", ".join(f"{value:.1f}" for value in values)
            print(f"{side}: median {statistics.median(values):.1f} completions per {what} ({listed})")
        ratios = [one / other for one, other in zip(*speeds, strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"Slipway / TRL, per {what}: median {statistics.median(ratios):.2f} ({listed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", type=Path, help=argparse.SUPPRESS)  # one run of Slipway's side
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir(), "slipway-trl-1.12.0"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=SETTINGS["rollouts"])
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--curves", type=Path, help="a JSON file for what all runs wrote")
    parser.add_argument("--slipway", type=json.loads, default={}, help="JSON: settings of Slipway's side alone")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.spec is not None:
        return run_slipway(json.loads(options.spec.read_text()))
    python = oracle_python(options.environment.absolute())
    settings = {**SETTINGS, "rollouts": options.rollouts}
    runs: dict[str, list[Run]] = {"slipway": [], "trl": []}
    with tempfile.TemporaryDirectory(prefix="slipway-ppo-") as scratch:
        model, chats, prompts = write_world(Path(scratch), options.hidden, options.layers)
        given = {"model": str(model), "chats": str(chats), "prompts": prompts, "threads": options.threads}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for side in ("slipway", "trl"):
                started = time.perf_counter()
                changed = options.slipway if side == "slipway" else {}
                spec = {**given, "seed": seed, "settings": {**settings, **changed}}
                command = [sys.executable, __file__] if side == "slipway" else [python, RUNNER]
                runs[side].append(run_side(command, spec, Path(scratch, f"{side}-{seed}")))
                print(f"seed {seed}, {side}: {time.perf_counter() - started:.0f} s in all", flush=True)
    if options.curves is not None:
        options.curves.write_text(json.dumps({side: [vars(run) for run in these] for side, these in runs.items()}))
    agreements = [compare(name, runs["slipway"], runs["trl"], options.window) for name in CURVES]
    report_speed(runs["slipway"], runs["trl"], settings["rollout_batch_size"])
    if not all(agreements):
        sys.exit("the curves do not agree")
    print("the curves agree")


if __name__ == "__main__":
    main()
