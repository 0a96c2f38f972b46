"""How long a training that resumes far into its data takes to its next step, beside one that resumes at the beginning.

    python tests/benchmarks/seek.py [--blocks 12000000] [--sample 10000000] [--runs 5]

Packed tokens of so many blocks are written, a tiny Llama makes one step on them, and its checkpoint is set to where it would
stand after 16 samples, and after `--sample`. From both it goes on for one step and saves, in turns; medians of the seconds from
the stage's start to the end of the step, and their difference, are printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
BATCH = 16
LENGTH = 8
PIECE = 100_000
"""Blocks that are written at once."""


def write_blocks(folder: Path, blocks: int) -> Path:
    """Packed tokens of documents of `PIECE` blocks each."""
    import numpy as np

    from stages.lib.text.packed import INFO, TokensInfo, TokensWriter, dtype_for
    from stages.lib.text.tokenizers import tokenizer_digest
    from tests.distributed.training_world import make_tokenizer

    folder.mkdir()
    tokenizer, draw = make_tokenizer(), np.random.default_rng(0)
    tokenizer.save_pretrained(folder / "tokenizer")
    counts = {}
    for split, size in (("train", blocks), ("heldout", 100)):
        with TokensWriter(folder, split, len(tokenizer)) as writer:
            for start in range(0, size, PIECE):
                writer.add(draw.integers(4, len(tokenizer), min(PIECE, size - start) * LENGTH))
        counts[split] = writer
    info = TokensInfo(
        dtype=dtype_for(len(tokenizer)), sequence_length=LENGTH, vocabulary_size=len(tokenizer),
        tokenizer_digest=tokenizer_digest(tokenizer), bos_token_id=None, eos_token_id=None,
        train_tokens=counts["train"].tokens, heldout_tokens=counts["heldout"].tokens,
        train_documents=counts["train"].documents, heldout_documents=counts["heldout"].documents,
    )  # fmt: skip
    (folder / INFO).write_text(info.model_dump_json())
    return folder


def run_one_step(ctx: Any, params: Any) -> float:
    """Goes on from the newest checkpoint for a step, and stops; returns the seconds that took."""
    from pipeline.errors import Preempted
    from stages.language_model.pretrain import STAGE

    ctx = replace(ctx, resume=ctx.checkpoints.newest().path, stop_requested=lambda: any(ctx.journal.events("step")))
    started = time.perf_counter()
    try:
        STAGE.run(ctx, params)
    except Preempted:
        return time.perf_counter() - started
    raise RuntimeError("it was not stopped")


def set_to(source: Any, target: Any, step: int) -> None:
    """Makes the checkpoint of another context's only step that of `step`."""
    (before,) = source.checkpoints.steps()
    folder = target.checkpoints.path(step)
    shutil.copytree(source.checkpoints.path(before), folder)
    (folder / "complete.json").unlink()
    state = json.loads((folder / "slipway.json").read_text())
    (folder / "slipway.json").write_text(json.dumps({**state, "step": step}))
    target.checkpoints.complete(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 12_000_000), ("sample", 10_000_000), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sys.path.insert(0, str(CHECKOUT))
    from stages.language_model.pretrain import STAGE
    from tests.distributed.test_training_library import context
    from tests.distributed.training_world import LLAMA

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_blocks(folder / "tokens", options.blocks)
        fields = {"max_steps": options.blocks // BATCH, "global_batch_size": BATCH, "learning_rate": 1e-3}
        params = STAGE.params.model_validate({"architecture": LLAMA, **fields})

        def begin(name: str) -> Any:
            return replace(context(folder / name, micro_batch_size=BATCH), inputs={"tokens": tokens})

        first = begin("first")
        run_one_step(first, params)
        taken: dict[int, list[float]] = {1: [], options.sample // BATCH: []}
        for number in range(options.runs + 1):
            for step, seconds in taken.items():
                ctx = begin(f"{step}-{number}")
                set_to(first, ctx, step)
                seconds.append(run_one_step(ctx, params))
        medians = {step: statistics.median(seconds[1:]) for step, seconds in taken.items()}
    for step, median in medians.items():
        print(f"from sample {step * BATCH:,}: median {median:.2f} s to the end of the next step")
    near, far = medians.values()
    print(f"difference {far - near:+.2f} s of {options.runs} runs each, ratio {far / near:.2f}")


if __name__ == "__main__":
    main()
