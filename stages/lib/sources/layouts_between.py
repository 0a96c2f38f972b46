"""The layout of two answers and what says which of them is better."""

from __future__ import annotations

import re
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, is_blank, text_of, type_name
from stages.lib.sources.layouts_chats import alpaca_prompt
from stages.lib.sources.layouts_preferences import assistant, preference, preference_chat

ANSWERS = ("output_1", "output_2")

ASKED = ("instruction", "input", "history")

JUDGED = ("", "model", "response", "answer", "output", "completion", "assistant", "option", "conversation")
WORDS = {
    **{f"{what}{side}": 1.0 for what in JUDGED for side in ("a", "1", "one")},
    **{f"{what}{side}": 2.0 for what in JUDGED for side in ("b", "2", "two")},
    **dict.fromkeys(("first", "left"), 1.0),
    **dict.fromkeys(("second", "right"), 2.0),
    **dict.fromkeys(("tie", "tiebothbad", "tiebothgood", "bothbad", "both", "neither", "draw", "equal", "same"), 1.5),
}
"""What arenas write, without anything but letters and digits -> the same as a number from 1 to 2."""


def preference_between(row: Row, conversion: Conversion) -> Row:
    """Two answers, output_1 and output_2, and which of them is preferred: 1, 2 or a number between (AlpacaEval), a word for it
    (`model_a`, `tie`: LMSYS), or a number on the scale that `first_answer` and `second_answer` are the ends of. How far it is
    from the middle becomes the margin, from 0 to 1.

    The answers are texts after instruction, input and history, or turns after the same or after messages, or whole
    conversations.
    """
    place = place_between(row, conversion)
    if place == 0.5:
        raise Dropped("tie")
    better, worse = (row.get(name) for name in (ANSWERS if place < 0.5 else reversed(ANSWERS)))
    given = {**row, "margin": row.get("margin", round(abs(2 * place - 1), 6))}
    texts = [text_of(row, name) for name in ANSWERS if not isinstance(row.get(name), list | dict)]
    asks = any(row.get(name) not in (None, "", []) for name in ASKED)
    if row.get("messages") is None and len(texts) == 2 and conversion.turns_in_text is None:
        return preference(given, alpaca_prompt(row, conversion), assistant(better), assistant(worse))
    if row.get("messages") is not None:
        for name in ASKED:
            if row.get(name) not in (None, "", []):
                conversion.notice(f"rows have '{name}' beside 'messages', which is not read")
    elif asks:
        given["messages"] = alpaca_prompt(row, conversion)
    return preference_chat({**given, "chosen": better, "rejected": worse}, conversion)


def place_between(row: Row, conversion: Conversion) -> float:
    """Where what is preferred stands between the first answer, 0, and the second, 1."""
    preferred = row.get("preference")
    if preferred is None or is_blank(str(preferred)):
        raise Dropped("missing_field", "preference")
    if (told := told_in_words(preferred)) is not None:
        return told - 1
    first = 1 if conversion.first_answer is None else conversion.first_answer
    second = first + 1 if conversion.second_answer is None else conversion.second_answer
    number = as_number(preferred, f"a number from {first:g} to {second:g}")
    if conversion.first_answer is None:
        conversion.preferred["above 1" if number > 1 else str(int(number)) if number in (0, 1) else "between"] += 1
    if first == 1 and second == 2 and number == 0:
        raise Dropped("tie")
    place = (number - first) / (second - first)
    if not 0 <= place <= 1:
        ends = f"from {first:g} to {second:g} (first_answer and second_answer name other ends)"
        raise Dropped("wrong_type", f"preference is {preferred}, not a number {ends}")
    return place


def as_number(preferred: Any, wanted: str) -> float:
    if isinstance(preferred, str):
        try:
            return float(preferred)
        except ValueError:
            words = "a word as model_a, model_b or tie"
            raise Dropped("wrong_type", f"preference is {preferred!r}, not {wanted}, nor {words}") from None
    if isinstance(preferred, bool) or not isinstance(preferred, int | float):
        raise Dropped("wrong_type", f"preference is {type_name(preferred)}, not {wanted}")
    return preferred


def told_in_words(preferred: Any) -> float | None:
    """What a word says, as a number from 1, the first answer, to 2; None where it is none that we know."""
    if not isinstance(preferred, str) or not re.search("[A-Za-z]", preferred):
        return None
    return WORDS.get(re.sub("[^a-z0-9]", "", preferred.lower()))
