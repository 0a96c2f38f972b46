"""What a model found in each held-out row, kept until training is done: figures are counted from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.stage import Context
from pipeline.store.durable import write_json
from stages.lib.processes.collectives import from_all, from_main

KEPT = "found-in-heldout.json"


def keep_found(ctx: Context, mine: Mapping[int, Any], num_rows: int) -> None:
    """Writes down what all processes found, as JSON can say it; `mine` is what this one did, by number of the row.

    It lies in the work folder before the journal says that this was measured: what the journal does not say after a
    restart is measured again.
    """
    parts = from_all(dict(mine))

    def write() -> None:
        whole = {number: found for part in parts for number, found in part.items()}
        assert len(whole) == num_rows, "every row was measured"
        write_json(ctx.work / KEPT, [whole[number] for number in range(num_rows)])

    from_main(write)


def kept_found(ctx: Context) -> list[Any]:
    """What was found when it was measured last."""
    found: list[Any] = json.loads((ctx.work / KEPT).read_bytes())
    return found
