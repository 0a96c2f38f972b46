"""Entities as a conversation, and back: `tests/benchmarks/fine_tuning/dialogues.py`, whose figures would be wrong without a word."""

from __future__ import annotations

from collections.abc import Sequence

from stages.lib.text.chat_template import Messages
from tests.benchmarks.fine_tuning.dialogues import (
    NOTHING,
    Entity,
    ask,
    dialogues,
    entities,
    entities_of,
    f1,
    mentions_of,
)

TEXT = "王小明在北京见了李四"
ROW = {
    "text": TEXT,
    "spans": [
        {"start": 8, "end": 10, "label": "PER"},
        {"start": 0, "end": 3, "label": "PER"},
        {"start": 4, "end": 6, "label": "GPE"},
    ],
}


def test_there_is_a_chat_per_type_and_every_mention_has_its_own_place() -> None:
    """0 to 3, 4 to 6 and 8 to 10 are counted by hand: 王 小 明 在 北 京 见 了 李 四."""
    person, place = ([turn["content"] for turn in chat][1::2] for chat in dialogues(ROW))
    assert person == ["PER$GPE", "王小明$李四", "[0,3)$[8,10)"]
    assert place == ["PER$GPE", "北京", "[4,6)"]


def test_a_text_without_entities_is_one_question() -> None:
    ((question, answer),) = dialogues({"text": TEXT, "spans": []})
    assert question["content"].endswith(TEXT)
    assert answer["content"] == NOTHING


def test_a_model_that_has_learned_the_chats_by_heart_is_right_in_all() -> None:
    rows = [ROW, {"text": "没有", "spans": []}]
    known = {
        tuple(turn["content"] for turn in chat[:position]): chat[position]["content"]
        for row in rows
        for chat in dialogues(row)
        for position in range(1, len(chat), 2)
    }

    def answer(chats: Sequence[Messages]) -> list[str]:
        return [known[tuple(turn["content"] for turn in chat)] for chat in chats]

    said = ask([row["text"] for row in rows], answer)
    assert [each.entities for each in said] == [entities_of(row) for row in rows]
    assert [each.mentions for each in said] == [mentions_of(row["text"], entities_of(row)) for row in rows]


def test_a_place_counts_only_where_its_mention_stands() -> None:
    assert entities(TEXT, "PER", "王小明$李四", "[0,3)$[7,9)") == {Entity("PER", 0, 3)}
    assert entities(TEXT, "PER", "王小明", "0-3") == set()
    assert entities(TEXT, "PER", "王小明", "[0,3)$[8,10)") == {Entity("PER", 0, 3)}


def test_f1_counts_all_rows_together() -> None:
    """One hit among two found and two expected: 2 * 1 / 4."""
    assert f1([{1, 2}, set()], [{1}, {3}]) == 0.5
    assert f1([set()], [set()]) == 0.0
