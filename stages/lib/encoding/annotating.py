"""Rows read by a published model, spread over processes, a part at a time: a run that was stopped goes on at the next part.

Each process holds the whole model. Which rows share a batch depends on nothing but the rows, so one process and several
say the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import Preempted
from pipeline.stage import Context
from pipeline.store.durable import write_json
from stages.lib.encoding.annotation import Annotator, Found
from stages.lib.processes.collectives import from_all, from_main
from stages.lib.rows.canonical import Row
from stages.lib.text.windows import evaluation_batch_size
from stages.lib.training.evaluating import Evaluator, StopRequested

ROWS_AT_ONCE = 2048


DEFAULT_BATCH_SIZE = 8


def part_in(path: Path) -> list[Found] | None:
    """The part that was done before a restart, if it was."""
    part: list[Found] | None = json.loads(path.read_bytes()) if path.exists() else None
    return part


def annotate_all(
    ctx: Context, annotator: Annotator, model: torch.nn.Module, rows: Sequence[Row], device: torch.device
) -> list[Found]:
    """What the model finds in each row, in their order, with `is_cut` beside it; the same in every process.

    Raises `Preempted` if asked to stop: the parts that are done lie in the work folder.
    """
    evaluator = Evaluator(model, ctx, device, ctx.resources.micro_batch_size or DEFAULT_BATCH_SIZE)
    found: list[Found] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        path = ctx.work / f"annotated-from-{start}.json"
        part = from_main(partial(part_in, path))
        if part is None:
            try:
                part = annotate_part(evaluator, annotator, rows[start : start + ROWS_AT_ONCE])
            except StopRequested:
                raise Preempted(f"after {start:,} of {len(rows):,} rows") from None
            keep_part(path, part)
        found += part
        ctx.journal.write("progress", what="annotate", done=len(found), total=len(rows))
    return found


def keep_part(path: Path, part: list[Found]) -> None:
    """Writes down what was found in some rows; the main process does it for all."""
    from_main(lambda: write_json(path, part))


def annotate_part(evaluator: Evaluator, annotator: Annotator, rows: Sequence[Row]) -> list[Found]:
    """What is found in each of the rows, the same in every process. Raises `StopRequested`."""
    items = [annotator.read(row) for row in rows]
    # The longest first: those of like length share a batch and little is padded.
    order = sorted(range(len(items)), key=lambda number: -annotator.num_tokens(items[number]))
    size = evaluation_batch_size(evaluator.batch_size, [annotator.num_windows(item) for item in items])
    if getattr(evaluator.model.config, "pad_token_id", None) is None:
        size = 1  # some heads refuse to read texts side by side unless they know what padding is
    mine: dict[int, Found] = {}

    def collate(places: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return annotator.collate([items[order[place["position"]]] for place in places])

    with evaluator.measuring():
        for indices, batch, counts in evaluator.passes([{}] * len(items), collate, size):
            numbers = [order[index] for index in indices]
            found = annotator.find(evaluator.model, batch, [items[number] for number in numbers])
            if counts:
                mine |= dict(zip(numbers, found, strict=True))
    whole = {number: each for part in from_all(mine) for number, each in part.items()}
    return [{**whole[number], "is_cut": annotator.is_cut(item)} for number, item in enumerate(items)]
