"""The texts of a row that cleaning may look at and change: what people, the assistant and the system say, in which part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from stages.lib.rows.canonical import Row

MESSAGE_FIELDS = ("messages", "prompt", "chosen", "rejected", "completion", "steps")
ANSWER_FIELDS = ("chosen", "rejected", "completion", "steps")
TEXT_FIELDS = ("text", "context", "question")
SPEAKERS = frozenset({"system", "user", "assistant"})
"""Whose turns are cleaned: what a tool returns is what it returned."""


@dataclass(frozen=True)
class Said:
    """One text of a row."""

    part: str
    """Whose turn it is in a chat or prompt; which answer; else its field."""
    text: str
    asked: str | None = None
    """The message that it answers, if it is an answer."""


def is_speech(message: dict[str, Any]) -> bool:
    """Whether the message is a turn of one of `SPEAKERS` with a text."""
    return message["role"] in SPEAKERS and isinstance(message.get("content"), str)


def texts_said(row: Row) -> Iterator[Said]:
    """The texts of a row, in order. Both answers of a pair answer the last message of its prompt."""
    question: str | None = None
    for name in MESSAGE_FIELDS:
        asked = question
        for message in filter(is_speech, row.get(name, ())):
            role, text = message["role"], message["content"]
            yield Said(part_of(name, role), text, asked if role == "assistant" else None)
            asked = text if role == "user" else asked
        question = asked if name == "prompt" else question
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            yield Said(name, row[name])


def rewrite_texts(row: Row, parts: Collection[str], change: Callable[[str], str]) -> Row:
    """The row with the texts of these parts changed; what else its messages hold stays as it is."""
    changed = dict(row)
    for name in TEXT_FIELDS:
        if name in parts and isinstance(row.get(name), str):
            changed[name] = change(row[name])
    for name in MESSAGE_FIELDS:
        if name in row:
            changed[name] = [
                change_message(message, change) if part_of(name, message["role"]) in parts else message
                for message in row[name]
            ]
    return changed


def change_message(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with its text changed, if it is speech."""
    return {**message, "content": change(message["content"])} if is_speech(message) else message


def part_of(field: str, role: str) -> str:
    """The part in which a turn of the role stands that is in the field."""
    return field if field in ANSWER_FIELDS else role


def shown_change(before: Row, after: Row) -> str:
    """The first text that was changed, as it was and as it is, both cut to where they differ."""
    pairs = zip(texts_said(before), texts_said(after), strict=True)
    old, new = next((old.text, new.text) for old, new in pairs if old.text != new.text)
    start = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    begin = max(0, start - 20)
    return f"{old[begin : start + 40]!r} became {new[begin : start + 40]!r}"
