"""Chats as training rows: what is asked, what is padding, and that the number of processes changes neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from stages.language_model.sft import give_template, require_ends
from stages.lib.formulas.token_losses import IGNORE, TARGETS
from stages.lib.rows.ledger import Ledger, add_ledgers
from stages.lib.text.chat_spans import encode_chat
from stages.lib.text.chats import Chats, collate_chats, tokenizing_chats
from stages.lib.text.tokenized_parts import TokenizedPart, TokenizedRows, require_enough
from tests.distributed.training_world import make_tokenizer

TOO_LONG = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 50}]}


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


ROWS = [
    chat("q", "one"),
    TOO_LONG,
    chat("q " * 12, "two", "r", "three"),
    chat("s", "four"),
    TOO_LONG,
    chat("t", "five"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def tokenized(folder: Path, tokenizer: Any, processes: int) -> TokenizedRows:
    """The rows tokenized as so many processes would."""
    how = tokenizing_chats(tokenizer, 24)
    folders = [folder / f"{rank}-of-{processes}" for rank in range(processes)]
    for rank, place in enumerate(folders):
        part = TokenizedPart()
        for index in range(rank, len(ROWS), processes):
            part.add(index, how.make(ROWS[index]))
        part.write(place)
    return TokenizedRows(folders)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_any_number_of_processes_makes_the_same_rows(tmp_path: Path, tokenizer: Any, processes: int) -> None:
    """Seven processes for six rows: one part is empty."""
    alone, together = Chats(tokenized(tmp_path, tokenizer, 1)), Chats(tokenized(tmp_path, tokenizer, processes))
    assert len(alone) == len(together) == 4
    assert alone.num_tokens == together.num_tokens == sum(len(row["input_ids"]) for row in alone)
    for one, other in zip(alone, together, strict=True):
        assert all((one[name] == other[name]).all() for name in ("input_ids", "said"))
    ledgers = [each.tokenized.ledger for each in (alone, together)]
    assert ledgers[0].as_json() == ledgers[1].as_json()
    assert dict(ledgers[0].dropped) == {"too_long": 2}
    assert dict(ledgers[0].repaired) == {"oldest_turns_dropped": 1}


def test_a_last_question_that_nobody_answers_is_left_out(tokenizer: Any) -> None:
    """It stays in the data, for a policy to be asked; nothing is to be learned from it, which is counted."""
    how = tokenizing_chats(tokenizer, 24)
    (whole,), (asked,) = (how.make(chat(*turns)) for turns in (("q", "one"), ("q", "one", "r")))
    assert asked.repaired == {"unanswered_ends_left_out": 1} and not whole.repaired
    assert dataclasses.replace(asked, repaired={}) == whole


def test_the_assistants_words_and_their_end_are_asked(tmp_path: Path, tokenizer: Any) -> None:
    rows = Chats(tokenized(tmp_path, tokenizer, 1))
    batch = collate_chats(padding_id=2)([rows[0], rows[2]])
    ids, said = encode_chat(tokenizer, ROWS[0]["messages"])
    asked = [token for token, mine in zip(ids, said, strict=True) if mine]
    targets = batch[TARGETS][0]
    assert targets[targets != IGNORE].tolist() == asked
    assert asked[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    # Each is asked for one place before its own.
    place = int((targets != IGNORE).nonzero()[0])
    assert batch["input_ids"][0, place + 1] == asked[0]


def test_padding_is_told_by_position(tokenizer: Any) -> None:
    """The padding id is the token that ends the turn: it is read and asked for nevertheless."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    rows = [
        {"input_ids": np.array([0, 9, end]), "said": np.array([0, 1, 1])},
        {"input_ids": np.array([0, 9, 9, 9, end]), "said": np.array([0, 0, 0, 1, 1])},
    ]
    batch = collate_chats(padding_id=end)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch[TARGETS].tolist() == [[9, end, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 9, end, IGNORE]]


def test_chats_that_do_not_end_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = Chats(tokenized(tmp_path, tokenizer, 1))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert rows.share_ending_with([1, end]) == 1.0
    require_ends(rows, [1, end])
    with pytest.raises(DataError, match="only 0% of the chats end"):
        require_ends(rows, [1])


def test_too_many_dropped_chats_stop_the_stage() -> None:
    ledger = Ledger(read=10, kept=4)
    ledger.drop("too_long", "a", 6)
    said = ("inputs.chats", "chats", "Raise max_length_tokens.")
    require_enough(ledger, 0.6, *said)
    with pytest.raises(DataError, match=r"60% of the chats cannot be used: 6 too_long \(for example "):
        require_enough(ledger, 0.5, *said)


def test_ledgers_are_added() -> None:
    first, second = Ledger(read=3, kept=1), Ledger(read=9, kept=2)
    first.drop("too_long", "a", 2)
    second.drop("too_long", "b", 6)
    second.drop("prompt_boundary", "c")
    both = add_ledgers(first, second).as_json()
    assert (both["read"], both["kept"]) == (12, 3)
    assert both["dropped"] == {
        "prompt_boundary": {"count": 1, "examples": ["c"]},
        "too_long": {"count": 8, "examples": ["a", "b"]},
    }


def test_templates(tokenizer: Any) -> None:
    give_template(tokenizer, None)
    give_template(tokenizer, "slipway")
    with pytest.raises(DataError, match=r"no preset, no file and no template .* has the name 'slipwy'"):
        give_template(tokenizer, "slipwy")
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        give_template(bare, None)
    with pytest.raises(DataError, match=r"is written with <\|im_start\|>, <\|im_end\|>"):
        give_template(bare, "chatml")
    give_template(bare, "slipway")
    assert bare.chat_template == tokenizer.chat_template
    # One of its own by name, or another in place of it.
    bare.chat_template = {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    with pytest.raises(
        DataError, match=r"several chat templates and none called default: rag, tool_use\. Set it to one"
    ):
        give_template(bare, None)
    give_template(bare, "tool_use")
    assert bare.chat_template == "{{ 2 }}"
    give_template(bare, "{{ 3 }}")
    assert bare.chat_template == "{{ 3 }}"
    bare.chat_template = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}
    give_template(bare, None)
    assert set(bare.chat_template) == {"default", "rag"}
