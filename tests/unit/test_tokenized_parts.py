"""Rows made into tokens once: by rounds that may be stopped, in parts that a restart finds, with a ledger of what was dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, Preempted
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.rows.canonical import write_rows
from stages.lib.text import tokenized_parts
from stages.lib.text.prompts import open_prompts
from stages.lib.text.tokenized_parts import (
    ROWS_PER_ROUND,
    TokenizedPart,
    TokenizedRow,
    TokenizedRows,
    Tokenizing,
    tokenize_file,
    tokenize_input,
)
from tests.distributed.training_world import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def context(folder: Path, inputs: dict[str, Path], stop: Callable[[], bool] = lambda: False) -> Context:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return Context(
        inputs=inputs,
        out=folder / "out",
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=0,
        resources=Resources(device="cpu", threads=1),
        journal=Journal(folder / "journal.jsonl", writes=True),
        world=World(),
        stop_requested=stop,
    )


class Counting:
    """Row n becomes the ids (n, n + 1) and the mask (0, 1); one without a number is dropped. Tells how often it was asked."""

    def __init__(self, tokenizer: Any, setting: int = 0) -> None:
        self.times = 0
        self.how = Tokenizing("rows", tokenizer, self.make, "max_rows", [setting])

    def make(self, row: dict[str, Any]) -> TokenizedRow:
        self.times += 1
        if row["n"] is None:
            return TokenizedRow(reason="no_number", example="x" * 300)
        return TokenizedRow(
            [([row["n"], row["n"] + 1], [0, 1])],
            {"name": f"row {row['n']}"},
            repaired={"oldest_turns_dropped": 1} if row["n"] == 3 else {},
        )


def write_input(folder: Path, train: list[int | None], heldout: list[int | None]) -> Path:
    folder.mkdir(parents=True)
    for split, numbers in (("train", train), ("heldout", heldout)):
        write_rows(folder / f"{split}.jsonl", [{"n": number} for number in numbers])
    return folder


@pytest.mark.slow
def test_rows_are_read_back_as_they_were_made(tmp_path: Path, tokenizer: Any) -> None:
    data = write_input(tmp_path / "data", [5, None, 3], [7])
    ctx = context(tmp_path, {"numbers": data})
    train, heldout, ledger = tokenize_input(ctx, "numbers", Counting(tokenizer).how, 0.3)
    found = [[(ids.tolist(), mask.tolist()) for ids, mask in train.sequences(index)] for index in range(len(train))]
    assert found == [[([5, 6], [0, 1])], [([3, 4], [0, 1])]]
    assert train.numbers.tolist() == [0, 2]
    assert train.columns["name"].tolist() == ["row 5", "row 3"]
    assert train.lengths.tolist() == [[2], [2]] and len(heldout) == 1
    assert (ledger.read, ledger.kept, dict(ledger.dropped)) == (4, 3, {"no_number": 1})
    assert dict(ledger.repaired) == {"oldest_turns_dropped": 1}
    assert json.loads((ctx.out / "ledger.json").read_text()) == ledger.as_json()
    (note,) = [event["text"] for event in ctx.journal.events("note")]
    assert note == "2 training and 1 held-out rows; dropped of 4: 1 no_number; of those kept: 1 oldest_turns_dropped"


def test_a_larger_dropped_share_is_refused_and_an_empty_side_too(tmp_path: Path, tokenizer: Any) -> None:
    """One of four rows is dropped: 25%."""
    data = write_input(tmp_path / "data", [5, None, 3], [7])
    with pytest.raises(DataError, match=r"inputs.numbers: 25% of the rows cannot be used: 1 no_number \(for example "):
        tokenize_input(context(tmp_path / "a", {"numbers": data}), "numbers", Counting(tokenizer).how, 0.24)
    empty = write_input(tmp_path / "empty", [5], [None, None])
    with pytest.raises(
        DataError,
        match=r"heldout.jsonl: none of the 2 rows can be used: 2 no_number \(for example .*Look at the rows, and",
    ):
        tokenize_input(context(tmp_path / "b", {"numbers": empty}), "numbers", Counting(tokenizer).how, 0.9)


def test_a_restart_makes_nothing_again_unless_something_changed(tmp_path: Path, tokenizer: Any) -> None:
    path = write_input(tmp_path / "data", [1, 2], [3]) / "train.jsonl"
    first, again, other, later = (Counting(tokenizer), Counting(tokenizer), Counting(tokenizer, 1), Counting(tokenizer))
    tokenize_file(context(tmp_path, {}), path, first.how)
    tokenize_file(context(tmp_path, {}), path, again.how)
    tokenize_file(context(tmp_path, {}), path, other.how)
    write_rows(path, [{"n": 1}, {"n": 4}])
    assert tokenize_file(context(tmp_path, {}), path, later.how).sequences(1)[0][0].tolist() == [4, 5]
    assert [each.times for each in (first, again, other, later)] == [2, 0, 2, 2]


def test_parts_of_another_layout_are_made_anew(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_input(tmp_path / "data", [1, 2], [3]) / "train.jsonl"
    tokenize_file(context(tmp_path, {}), path, Counting(tokenizer).how)
    monkeypatch.setattr(tokenized_parts, "LAYOUT", tokenized_parts.LAYOUT + 1)
    again = Counting(tokenizer)
    tokenize_file(context(tmp_path, {}), path, again.how)
    assert again.times == 2


def test_a_stop_comes_between_rounds_and_leaves_no_part(tmp_path: Path, tokenizer: Any) -> None:
    """Asked to stop after the first round of `ROWS_PER_ROUND`: the rest is not looked at, and progress was told once."""
    path = write_input(tmp_path / "data", list(range(2 * ROWS_PER_ROUND)), [3]) / "train.jsonl"
    counting = Counting(tokenizer)
    ctx = context(tmp_path, {}, stop=lambda: counting.times > 0)
    with pytest.raises(Preempted):
        tokenize_file(ctx, path, counting.how)
    assert counting.times == ROWS_PER_ROUND
    (line,) = ctx.journal.events("progress")
    assert (line["what"], line["done"], line["total"]) == ("train rows tokenized", ROWS_PER_ROUND, 2 * ROWS_PER_ROUND)
    assert not list(tmp_path.glob("rows/*"))
    assert len(tokenize_file(context(tmp_path, {}), path, Counting(tokenizer).how)) == 2 * ROWS_PER_ROUND


def test_a_part_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file fails: what is there does not stand where a part is looked for, and the next attempt takes its place."""
    part = TokenizedPart()
    part.add(0, TokenizedRow([([1], [1])]))
    with monkeypatch.context() as patch:
        patch.setattr(tokenized_parts, "json_text", lambda *_: pytest.fail("disk full"))
        with pytest.raises(pytest.fail.Exception):
            part.write(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    part.write(tmp_path / "part")
    assert len(TokenizedRows([tmp_path / "part"])) == 1


def test_prompts_are_taken_up_again_with_their_rows(tmp_path: Path, tokenizer: Any) -> None:
    """The second prompt is too long. After a restart the others have the same ids, and the row that each comes from."""
    said = {"role": "assistant", "content": "Yes."}
    texts = ["a", "long " * 60, "b"]
    rows = [{"messages": [{"role": "user", "content": text}, said], "id": text} for text in texts]
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "heldout.jsonl", rows[:1])
    opened = [open_prompts(context(tmp_path, {"prompts": data}), tokenizer, "chat", 20, 0.5) for _ in range(2)]
    for train, heldout, ledger in opened:
        assert [(row.index, row.row["id"], row.prompt) for row in train.rows] == [
            (index, texts[index], [{"role": "user", "content": texts[index]}]) for index in (0, 2)
        ]
        assert heldout.rows[0].ids == train.rows[0].ids != train.rows[1].ids
        assert dict(ledger.dropped) == {"prompt_too_long": 1}
    assert opened[0][0].rows == opened[1][0].rows
    progress = list(context(tmp_path, {}).journal.events("progress"))
    assert [line["what"] for line in progress] == ["train prompts tokenized", "heldout prompts tokenized"]
