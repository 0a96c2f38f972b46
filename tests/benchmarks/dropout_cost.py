"""What dropout that is a function of the row costs: a step with it against one with torch's, on one core of this machine.

    python tests/benchmarks/dropout_cost.py [--hidden 256] [--length 256] [--rows 4] [--runs 7]

Forward and backward pass of a GPT-2 of four layers with all rates 0.1. Four ways take turns, so that a machine whose speed
drifts slows all of them: without dropout as the loop runs it then, with torch's own, and with that of the rows; the last also
with gradient checkpointing, beside torch's with it. Medians, their ratios, and what a mask alone takes are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


def make_pass(
    options: argparse.Namespace, rate: float, *, by_rows: bool, recomputed: bool = False
) -> Callable[[], None]:
    """A step's forward and backward pass."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.lib.training.dropout import RowDropout

    torch.manual_seed(0)
    sizes = {"n_embd": options.hidden, "n_layer": 4, "n_head": options.hidden // 32, "n_positions": options.length}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **rates, vocab_size=2048)).train()
    model.config.use_cache = False
    ids_BT = torch.randint(2048, (options.rows, options.length))
    dropout, cpu = RowDropout(), torch.device("cpu")
    if by_rows:
        dropout.learn(model, cpu, lambda times: model(input_ids=ids_BT[:1].expand(times, -1)))
    if recomputed:
        settings: dict[str, Any] = {"use_reentrant": False}
        model.gradient_checkpointing_enable({**settings, **({"context_fn": dropout.recomputing} if by_rows else {})})

    def step() -> None:
        with dropout.rows(range(options.rows), 0, cpu):
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        model.zero_grad()

    return step


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("length", 256), ("rows", 4), ("runs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sys.path.insert(0, str(CHECKOUT))
    import torch
    from torch.nn import functional

    from stages.lib.formulas.dropout_masks import keep_mask

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    shape = (options.rows, options.hidden // 32, options.length, options.length)
    values, keys = torch.randn(shape), torch.arange(options.rows)
    ways: dict[str, Callable[[], Any]] = {
        "a step without dropout": make_pass(options, 0.0, by_rows=True),
        "with torch's": make_pass(options, 0.1, by_rows=False),
        "with that of rows": make_pass(options, 0.1, by_rows=True),
        "recomputed, with torch's": make_pass(options, 0.1, by_rows=False, recomputed=True),
        "recomputed, with that of rows": make_pass(options, 0.1, by_rows=True, recomputed=True),
        "torch's on attention": lambda: functional.dropout(values, 0.1),
        "that of rows on attention": lambda: values * keep_mask(keys, shape[1:], 0.1) * (1 / 0.9),
    }
    for call in ways.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.runs):
        for name, call in ways.items():
            taken[name].append(seconds(call))
    for name, values_taken in taken.items():
        print(
            f"{name}: median {statistics.median(values_taken) * 1000:.1f} ms, {min(values_taken) * 1000:.1f} at least"
        )
    for ours, theirs in (
        ("with that of rows", "with torch's"),
        ("recomputed, with that of rows", "recomputed, with torch's"),
        ("that of rows on attention", "torch's on attention"),
    ):
        pairs = zip(taken[ours], taken[theirs], strict=True)
        print(f"{ours} / {theirs}: median {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
