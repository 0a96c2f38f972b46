"""The margin of preference rows: what layouts read, which values are none, and that it travels to the mixed data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.data.clean import STAGE as CLEAN
from stages.data.mix import STAGE as MIX
from stages.lib.sources.conversion import Conversion, Dropped
from stages.lib.sources.layouts import LAYOUTS, convert_record
from stages.lib.sources.params import FilesSource
from tests.unit.running_stages import problems_of, run_stage

PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("preference_alpaca", {"instruction": "a", "chosen": "b", "rejected": "c"}),
    ("preference_alpaca", {"instruction": "a", "output": ["b", "between", "c"]}),
    ("preference_chat", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("preference_chat", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}),
]
PAIR = {
    "prompt": [{"role": "user", "content": "a"}],
    "chosen": [{"role": "assistant", "content": "b"}],
    "rejected": [{"role": "assistant", "content": "c"}],
}


def convert(layout: str, row: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
    """The canonical row, or its reason and detail."""
    ((_, found),) = convert_record(row, LAYOUTS[layout], columns or {}, Conversion(turns_in_text="transcript"))
    return (found.reason, found.detail) if isinstance(found, Dropped) else found


@pytest.mark.parametrize(("layout", "row"), PAIRS)
def test_a_margin_is_read_where_there_is_one(layout: str, row: dict[str, Any]) -> None:
    assert convert(layout, row) == PAIR
    assert convert(layout, {**row, "margin": None}) == PAIR
    for margin in (0, 2, 0.25):
        assert convert(layout, {**row, "margin": margin}) == {**PAIR, "margin": margin}
    renamed = {**row, "difference": 1.5, "margin": "of another kind"}
    assert convert(layout, renamed, {"margin": "difference"}) == {**PAIR, "margin": 1.5}


@pytest.mark.parametrize("margin", ["1.5", True, [1], -0.5, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize(("layout", "row"), PAIRS[::2])
def test_what_is_no_margin(margin: Any, layout: str, row: dict[str, Any]) -> None:
    reason = ("wrong_type", f"margin is {margin!r}, not a finite number of at least 0")
    assert convert(layout, {**row, "margin": margin}) == reason


def test_margins_travel_through_clean_and_mix(tmp_path: Path) -> None:
    """Row i has the margin i; every third row says it as text, and is dropped."""
    rows = [
        {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "by": i if i % 3 else str(i)}
        for i in range(30)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"kind": "files", "paths": [str(file)], "layout": "preference_chat", "columns": {"margin": "by"}}
    how = {"format": "preferences", "source": {**source, "max_broken_fraction": 0.4}}
    cleaned = run_stage(CLEAN, how, tmp_path / "cleaned")
    assert json.loads((cleaned.out / "ledger.json").read_text())["dropped"]["wrong_type"]["count"] == 10
    mixed = run_stage(MIX, {"heldout_fraction": 0.3}, tmp_path / "mixed", {"sources.graded": cleaned.out})
    found = [*mixed.rows("train.jsonl"), *mixed.rows("heldout.jsonl")]
    assert len(found) == 20
    assert all(row["chosen"][0]["content"] == f"good {row['margin']}" for row in found)


def test_only_preferences_have_margins(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").touch()
    source = {"kind": "files", "paths": ["chats.jsonl"], "layout": "messages", "columns": {"margin": "by"}}
    assert "the layout messages has no 'margin'" in problems_of(FilesSource, source, tmp_path)
