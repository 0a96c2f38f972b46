"""Where texts stand in a row, as rules for cleaning name it, and where a rule looks if nothing else is said."""

from __future__ import annotations

from typing import Literal

Part = Literal[
    "text", "system", "user", "assistant", "chosen", "rejected", "completion", "steps", "context", "question"
]
"""Where a text stands in a row: whose turn of a chat or prompt it is, which answer of a pair, or which field."""

PARTS: dict[str, tuple[Part, ...]] = {
    "text": ("text",),
    "chats": ("system", "user", "assistant"),
    "prompts": ("system", "user", "assistant"),
    "preferences": ("system", "user", "assistant", "chosen", "rejected"),
    "unpaired_preferences": ("system", "user", "assistant", "completion"),
    "ratings": ("system", "user", "assistant", "completion"),
    "step_labels": ("system", "user", "assistant", "steps"),
    "labels": ("text",),
    "spans": ("text",),
    "questions": ("context", "question"),
}
"""Format -> the parts that its rows have. Of prompts and preferences, `assistant` is what was answered earlier in the prompt."""

ALL = PARTS
SAID = {format: tuple(part for part in parts if part != "system") for format, parts in PARTS.items()}
ASKED: dict[str, tuple[Part, ...]] = {
    **dict.fromkeys(("chats", "prompts", "preferences", "unpaired_preferences", "ratings", "step_labels"), ("user",))
}
TEXTS: dict[str, tuple[Part, ...]] = {"text": ("text",), "labels": ("text",), "spans": ("text",)}
SINGLE: dict[str, tuple[Part, ...]] = {
    **SAID,
    "preferences": ("user", "chosen"),
    "unpaired_preferences": ("user", "completion"),
    "ratings": ("user", "completion"),
    "step_labels": ("user", "steps"),
}
CHOSEN: dict[str, tuple[Part, ...]] = {"chats": ("assistant",), "preferences": ("chosen",)}
ANSWERED: dict[str, tuple[Part, ...]] = {
    "chats": ("assistant",),
    "preferences": ("assistant", "chosen", "rejected"),
    "unpaired_preferences": ("assistant", "completion"),
    "ratings": ("assistant", "completion"),
    "step_labels": ("assistant", "steps"),
}
"""Of formats that have them: what is said in turns, what is asked, single texts, what is learned to say, all answers.
Of unpaired preferences, ratings and labelled steps it is not known beforehand whether an answer is learned."""
