"""Layouts of single answers that people called desirable or not, or rated."""

from __future__ import annotations

import math
from typing import Any

from stages.lib.rows.blank import is_blank
from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, truth_of, type_name
from stages.lib.sources.layouts_chats import RATINGS, alpaca_prompt, chat_of
from stages.lib.sources.layouts_preferences import answer_in, answer_turns, prompt_in
from stages.lib.sources.tool_turns import Message, system_turn
from stages.lib.sources.turns import with_system, without_train

CHAT_NAMES_OF_UNPAIRED = ("messages", "conversations")
PROMPT_NAMES_OF_UNPAIRED = ("prompt", *CHAT_NAMES_OF_UNPAIRED, "instruction")


def unpaired_preference(row: Row, conversion: Conversion) -> Row:
    """prompt, completion and label (TRL), as texts or turns; instruction, input and history in the place of the prompt; or a
    whole chat and its label, whose last turn is the completion.
    """
    desirable = truth_of(row, "label", RATINGS)
    if desirable is None:
        raise Dropped("missing_field", "label")
    return {**answered_prompt(row, conversion), "label": desirable}


def rated_answer(row: Row, conversion: Conversion) -> Row:
    """The same with ratings in the place of the label: a mapping of attributes to numbers, one number, or the columns that the
    source's `rating_columns` names (HelpSteer). What is null, blank or N/A is not rated.
    """
    if conversion.rating_columns:
        if missing := [name for name in conversion.rating_columns if name not in row]:
            raise Dropped("missing_field", f"{missing[0]}, which rating_columns names")
        said: Any = {name: row.get(name) for name in conversion.rating_columns}
    else:
        said = row.get("ratings")
        if said is None:
            raise Dropped("missing_field", "ratings (or name their columns in rating_columns)")
        said = said if isinstance(said, dict) else {"rating": said}
    ratings = {str(name): rating_in(value, str(name)) for name, value in said.items()}
    if all(value is None for value in ratings.values()):
        raise Dropped("unrated")
    return {**answered_prompt(row, conversion), "ratings": ratings}


UNRATED = frozenset({"n/a", "na", "none", "null", "nan"})
"""How a text says that there is no rating, in any case."""


def rating_in(value: Any, name: str) -> float | int | None:
    """A finite number, also where it is written as a text; None where there is none."""
    if isinstance(value, str):
        if is_blank(value) or value.strip().lower() in UNRATED:
            return None
        try:
            value = float(value)
        except ValueError:
            raise Dropped("wrong_type", f"{name} is {value!r}, no rating") from None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Dropped("wrong_type", f"{name} is {type_name(value)}, no rating")
    if not abs(value) <= 1e6:
        raise Dropped("wrong_type", f"{name} is {value!r}, and a rating is from -1e6 to 1e6")
    return value


def answered_prompt(row: Row, conversion: Conversion) -> Row:
    """The prompt of a row, and its one answer."""
    if row.get("completion") is None:
        *prompt, completion = whole_chat(row, conversion)
    else:
        turns = answer_turns(row, "completion", conversion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise Dropped("bad_turn_order", "completion is not one assistant turn")
        prompt, (completion,) = prompt_before(row, conversion), turns
    return {"prompt": without_train(prompt), "completion": [answer_in(completion)]}


def whole_chat(row: Row, conversion: Conversion) -> list[Message]:
    """The chat of a row without a completion of its own: it ends with the assistant's turn, after another one."""
    names = [name for name in CHAT_NAMES_OF_UNPAIRED if row.get(name) is not None]
    if not names or row.get("prompt") is not None:
        raise Dropped("missing_field", "completion")
    chat = chat_of({**row, "messages": said_by_all(row, names)}, "messages", conversion)
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise Dropped("bad_turn_order", "the chat does not end with the assistant's turn")
    return chat


def prompt_before(row: Row, conversion: Conversion) -> list[Message]:
    """What a completion answers. Raises `Dropped` where two columns say different things."""
    names = [name for name in PROMPT_NAMES_OF_UNPAIRED if row.get(name) not in (None, "", [])]
    if names == ["instruction"]:
        return with_system(alpaca_prompt(row, conversion), system_turn(row, conversion), conversion)
    if not names:
        raise Dropped("missing_field", "prompt")
    if row.get("input") or row.get("history"):
        conversion.notice(f"rows have 'input' or 'history' beside '{names[0]}', which is not read")
    return prompt_in({**row, "messages": said_by_all(row, names)}, conversion)


def said_by_all(row: Row, names: list[str]) -> object:
    """What stands in the first of the columns. Raises `Dropped` if another one says something else."""
    if any(row[name] != row[names[0]] for name in names[1:]):
        raise Dropped("contradictory", " and ".join(names))
    return row[names[0]]
