"""Rows as stages see them: who says what in them, what is marked or learned, and how long they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from stages.lib.rows.canonical import FORMATS, Row

Piece = tuple[str, bool]
"""Some text, and whether it is marked: learned from, an entity, an answer."""

Part = dict[str, Any]
"""`name` (user, assistant, text, chosen, ...) and `pieces`."""

PERCENTILES = (50, 90, 99)


def part(name: str, *pieces: Piece) -> Part:
    return {"name": name, "pieces": [list(piece) for piece in pieces if piece[0]]}


def parts_of_row(row: Row, format: str) -> list[Part]:
    """What the row says, part by part; what a stage learns to say, or to find, is marked."""
    match format:
        case "chats":
            return said_parts(row["messages"])
        case "prompts":
            return said_parts(row["prompt"])
        case "preferences":
            answers = [part(name, (row[name][0]["content"], True)) for name in ("chosen", "rejected")]
            return [*said_parts(row["prompt"]), *answers, *extra_part(row, "margin")]
        case "spans":
            return [part("text", *marked_pieces(row["text"], row["spans"], "label"))]
        case "questions":
            spans = [
                {"start": answer["start"], "end": answer["start"] + len(answer["text"])} for answer in row["answers"]
            ]
            answers = [part("answers", (" | ".join(dict.fromkeys(a["text"] for a in row["answers"])), True))]
            none = [part("answers", ("none: cannot be answered", False))]
            context = part("context", *marked_pieces(row["context"], spans, None))
            return [context, part("question", (row["question"], False)), *(answers if row["answers"] else none)]
        case _:
            learned = {"label"}
            return [part(name, (str(row[name]), name in learned)) for name in FORMATS[format].fields]


def said_parts(messages: Sequence[Row]) -> list[Part]:
    return [
        part(message["role"], (message["content"], message["role"] == "assistant" and message.get("train", True)))
        for message in messages
    ]


def extra_part(row: Row, name: str) -> list[Part]:
    return [part(name, (str(row[name]), False))] if name in row else []


def marked_pieces(text: str, spans: Iterable[Row], label: str | None) -> list[Piece]:
    """The text with its spans marked, each with its label behind it; spans within others are left out."""
    pieces: list[Piece] = []
    position = 0
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        if span["start"] < position:
            continue
        said = text[span["start"] : span["end"]]
        pieces += [(text[position : span["start"]], False), (f"{said}|{span[label]}" if label else said, True)]
        position = span["end"]
    return [*pieces, (text[position:], False)]


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """Least, percentiles and largest of the lengths: the p-th percentile is the least that p % are no longer than."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    found = {"min": ordered[0]}
    for percent in PERCENTILES:
        found[f"p{percent}"] = ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]
    return {**found, "max": ordered[-1]}
