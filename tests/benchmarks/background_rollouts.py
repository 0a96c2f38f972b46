"""What writing rollouts in the background saves: seconds of a rollout with it, as a share of those without, on two cores.

    python tests/benchmarks/background_rollouts.py [--hidden 384] [--new-tokens 48] [--completions 16] [--epochs 2] [--runs 3]

GRPO in one process with one thread, so that one core trains while the other writes. Both ways take turns, with the same prompts,
policy and random numbers. Of the rollouts between the first and the last, the median time from one's line in the journal to the
next's is printed, and how it is made up: writing and judging, and learning; and the ratio, beside what it would be if the
longer part hid the other one whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
ROLLOUTS = 6


def rollouts_of(world: Any, folder: Path, options: argparse.Namespace, *, background: bool) -> list[dict[str, float]]:
    """Of each rollout between the first and the last: its seconds as a whole, and in its parts."""
    from tests.integration.on_policy_world import align

    changes = {
        "rollouts": ROLLOUTS,
        "rollout_batch_size": options.completions,
        "global_batch_size": options.completions,
        "epochs_per_rollout": options.epochs,
        "max_prompt_tokens": 64,
        "max_new_tokens": options.new_tokens,
        "mismatch_cap": 2.0,
        "heldout_prompts": 1,
        **({"background_rollouts": True} if background else {}),
    }
    resources = {"micro_batch_size": options.completions, "save_every_steps": 1000}
    seen = align("grpo", world.inputs, folder, changes, resources=resources)
    lines = seen.lines("rollout")
    ends = [line["time"] for line in lines]
    return [
        {
            "whole": end - before,
            "written and judged": line["rollout_seconds"] + previous.get("background_seconds", 0.0),
            "learned": line["update_seconds"],
        }
        for before, end, previous, line in zip(ends, ends[1:-1], lines, lines[1:-1], strict=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 384), ("new-tokens", 48), ("completions", 16), ("epochs", 2), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(CHECKOUT))
    from tests.distributed.training_world import make_tokenizer, write_chats, write_model
    from tests.integration.on_policy_world import OnPolicyWorld

    taken: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), make_tokenizer()
        sizes = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_hidden_layers": 4}
        model = write_model(folder / "model", tokenizer, **sizes, max_position_embeddings=64 + options.new_tokens)
        world = OnPolicyWorld(model, write_chats(folder / "chats"), tokenizer)
        for run in range(options.runs):
            for background in (False, True):
                taken[background] += rollouts_of(world, folder / f"{run}-{background}", options, background=background)
    medians = {
        background: {part: statistics.median(each[part] for each in rollouts) for part in rollouts[0]}
        for background, rollouts in taken.items()
    }
    for background, parts in medians.items():
        shown = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        print(f"{'in the background' if background else 'one after the other'}: {shown}")
    before = medians[False]
    best = max(before["written and judged"], before["learned"]) / before["whole"]
    print(
        f"ratio: {medians[True]['whole'] / before['whole']:.2f}; {best:.2f} if the longer part hid the other one whole"
    )


if __name__ == "__main__":
    main()
