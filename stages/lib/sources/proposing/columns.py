"""What the columns of a sample hold, as far as a layout may care."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.layouts_chats import RATINGS
from stages.lib.sources.proposing.looking import BIO_TAG
from stages.lib.sources.turns import CONTENT_KEYS, ROLE_KEYS, ROLES, is_transcript, turns_in_json

MAJORITY = 0.8
"""A column holds what at least this share of its values is."""

TEXTS = frozenset({"text", "turns_json", "turn_json", "transcript", "truth_text"})
TURNS = frozenset({"chat", "asked", "turn"})
STRUCTURES = TURNS | {"tags", "spans", "pieces", "answers", "documents", "instances", "entity", "pairs"}
"""What says by its form alone what it is."""

WORDS = {
    "text": "texts",
    "turns_json": "conversations as JSON text",
    "turn_json": "turns as JSON text",
    "transcript": "transcripts of Human: and Assistant:",
    "chat": "conversations that the assistant answers",
    "asked": "conversations that end with the user's turn",
    "turn": "single turns",
    "truth": "truth values",
    "truth_text": "yes and no as texts (true, good, desirable, 1, or their opposites)",
    "binary": "ones and zeros",
    "number": "numbers",
    "tags": "tags of tokens",
    "texts": "lists of texts",
    "numbers": "lists of numbers",
    "pairs": "lists of pairs of texts",
    "spans": "lists of spans (start, end, label)",
    "pieces": "texts in pieces, some of them entities",
    "answers": "answers with their offsets",
    "documents": "paragraphs with questions",
    "instances": "lists of inputs and outputs",
    "entity": "entities as names and tokens",
    "mapping": "mappings",
    "mappings": "lists of mappings",
    "list": "lists",
    "bytes": "bytes that are no text",
    "mixed": "values of several kinds",
    "nothing": "nothing",
}
"""Kind of a column -> what it holds, in the plural."""


@dataclass(frozen=True)
class Column:
    """One column of the sample."""

    name: str
    kind: str
    """A key of `WORDS`."""
    filled: int
    """In how many rows it holds something."""
    distinct: int
    """How many different values it has, as far as they are texts or numbers."""
    mean_characters: float
    values: tuple[Any, ...]
    """The first of its values that hold something."""

    @property
    def is_structure(self) -> bool:
        return self.kind in STRUCTURES


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns of the rows, in the order in which they come up."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [column_of(name, [row.get(name) for row in rows]) for name in names]


def column_of(name: str, values: Sequence[Any]) -> Column:
    held = [value for value in values if holds_something(value)]
    plain = [str(value) for value in held if isinstance(value, str | int | float)]
    mean = sum(map(len, plain)) / len(plain) if plain else 0.0
    return Column(name, kind_of_values(held), len(held), len(set(plain)), mean, tuple(held[:200]))


def holds_something(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return False
    return value is not None and value not in ("", [], {})


def kind_of_values(values: Sequence[Any]) -> str:
    """What most of the values are; of truth values and numbers, whether all say yes or no."""
    kinds = Counter(map(kind_of_value, values))
    if not kinds:
        return "nothing"
    if kinds.keys() <= {"number", "truth"}:
        whole = all(value in (0, 1) for value in values)
        return ("truth" if kinds.keys() == {"truth"} else "binary") if whole else "number"
    if sum(kinds[each] for each in TURNS) >= MAJORITY * kinds.total():
        # A conversation that someone else opens or closes is one among many: what most rows end with decides.
        return "asked" if kinds["asked"] >= MAJORITY * kinds.total() else "turn" if kinds.keys() == {"turn"} else "chat"
    if kinds.keys() == {"text"} and all(value.strip().lower() in RATINGS for value in values):
        return "truth_text"
    kind, count = kinds.most_common(1)[0]
    if count >= MAJORITY * kinds.total():
        return kind
    return "text" if kinds.keys() <= TEXTS | {"number", "truth"} else "mixed"


def kind_of_value(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return kind_of_text(value)
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, dict):
        return kind_of_mapping(value)
    return kind_of_list(value) if isinstance(value, list) else "mixed"


def kind_of_text(value: str) -> str:
    if is_transcript(value):
        return "transcript"
    turns = turns_in_json(value)
    if turns is None:
        return "text"
    return "turns_json" if isinstance(turns, list) else "turn_json"


def kind_of_mapping(value: dict[str, Any]) -> str:
    if is_a_turn(value):
        return "turn"
    return "answers" if {"text", "answer_start"} <= value.keys() else "mapping"


def kind_of_list(value: list[Any]) -> str:
    if all(isinstance(item, dict) for item in value):
        return kind_of_mappings(value)
    if all(isinstance(item, str) for item in value):
        return "tags" if all(BIO_TAG.fullmatch(item) for item in value) else "texts"
    if all(isinstance(item, int | float) for item in value):
        return "numbers"
    if all(isinstance(item, list) for item in value):
        if all(len(item) == 3 and isinstance(item[0], int) and isinstance(item[1], int) for item in value):
            return "spans"
        return "pairs" if all(len(item) == 2 and isinstance(item[0], str) for item in value) else "list"
    return "entity" if len(value) == 3 and isinstance(value[0], str) and isinstance(value[2], list) else "list"


def kind_of_mappings(value: list[dict[str, Any]]) -> str:
    if all(map(is_a_turn, value)):
        role = next((value[-1][key] for key in ROLE_KEYS if value[-1].get(key) is not None), "")
        return "asked" if ROLES.get(str(role).lower()) == "user" else "chat"
    keys = [item.keys() for item in value]
    for kind, needed in (
        ("spans", {"start", "end", "label"}),
        ("answers", {"text", "answer_start"}),
        ("answers", {"text", "start"}),
    ):
        if all(needed <= each for each in keys):
            return kind
    if all("text" in each for each in keys) and any("entity" in each for each in keys):
        return "pieces"
    if all({"paragraphs", "qas"} & each for each in keys) or all({"question", "answers"} <= each for each in keys):
        return "documents"
    return "instances" if all("output" in each for each in keys) else "mappings"


def is_a_turn(value: dict[str, Any]) -> bool:
    """Whether it says who speaks, and something beside that."""
    role = next((value[key] for key in ROLE_KEYS if value.get(key) is not None), None)
    said = value.keys() & {*CONTENT_KEYS, "tool_calls", "function_call"}
    return isinstance(role, str) and (bool(said) or role.lower() in ROLES)


# Of tokens

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def token_options(tokens: Column) -> Iterator[tuple[str, Any, str]]:
    """(option, value, why) of what stands between tokens, and of digits at their ends."""
    found = [token for value in tokens.values if isinstance(value, list) for token in value if isinstance(token, str)]
    if not found:
        return
    digits = sum(len(token) > 1 and token[-1].isdigit() for token in found) >= 0.99 * len(found)
    if digits:
        yield "strip_segment_digit", True, "each token ends with a digit that is no part of it"
        found = [token[:-1] for token in found]
    alone = sum(len(token) == 1 and bool(CJK.match(token)) for token in found)
    if alone >= 0.5 * len(found):
        yield "token_separator", "", "tokens are single characters of a script without spaces"
