"""Rows as stages see them: who says what in them, what is marked or learned, and how long they are."""

from __future__ import annotations

import json
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
            return said_parts(row["messages"], learned=True)
        case "prompts":
            return said_parts(row["prompt"])
        case "preferences":
            answers = [part(name, (row[name][0]["content"], True)) for name in ("chosen", "rejected")]
            return [*said_parts(row["prompt"]), *answers, *extra_part(row, "margin")]
        case "unpaired_preferences":
            judged = part("label", ("desirable" if row["label"] else "undesirable", False))
            return [*said_parts(row["prompt"]), part("completion", (row["completion"][0]["content"], True)), judged]
        case "ratings":
            rated = ", ".join(
                f"{name} {'not rated' if value is None else value}" for name, value in row["ratings"].items()
            )
            said = part("completion", (row["completion"][0]["content"], True))
            return [*said_parts(row["prompt"]), said, part("ratings", (rated, False))]
        case "step_labels":
            called = {True: "right", False: "wrong", None: "not known"}
            steps = [
                part(f"step {number}, {called[label]}", (step["content"], label is not None))
                for number, (step, label) in enumerate(zip(row["steps"], row["labels"], strict=True), start=1)
            ]
            return [*said_parts(row["prompt"]), *steps]
        case "spans":
            return [part("text", *marked_pieces(row["text"], row["spans"], "label"))]
        case "questions":
            answers = row["answers"] or []
            spans = [{"start": each["start"], "end": each["start"] + len(each["text"])} for each in answers]
            said = " | ".join(dict.fromkeys(each["text"] for each in answers))
            none = "not known yet" if row["answers"] is None else "none: the context does not answer it"
            return [
                part("context", *marked_pieces(row["context"], spans, None)),
                part("question", (row["question"], False)),
                part("answers", (said, True) if answers else (none, False)),
            ]
        case "labels":
            pair = [part("text_pair", (row["text_pair"], False))] if row.get("text_pair") else []
            label = ("not known yet", False) if row["label"] is None else (row["label"], True)
            return [part("text", (row["text"], False)), *pair, part("label", label)]
        case _:
            return [part(name, (str(row[name]), False)) for name in FORMATS[format].fields]


def said_parts(messages: Sequence[Row], *, learned: bool = False) -> list[Part]:
    """What each message says, and below it whatever else it holds: calls of tools, reasoning. Of a prompt nothing is learned."""

    def is_learned(message: Row) -> bool:
        return learned and message["role"] == "assistant" and message.get("train", True)

    return [part(message["role"], (said_in_message(message), is_learned(message))) for message in messages]


def said_in_message(message: Row) -> str:
    others = {name: value for name, value in message.items() if name not in ("role", "content", "train") and value}
    told = [f"{name}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for name, value in others.items()]
    return "\n".join(filter(None, [message.get("content"), *told]))


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
