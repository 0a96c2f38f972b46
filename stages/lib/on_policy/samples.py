"""Completions as rewards see them, and the rows that they belong to. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import Problem
from stages.lib.on_policy.reward_values import Unscorable
from stages.lib.rows.canonical import Row
from stages.lib.text.chat_template import Messages, Prompt


@dataclass(frozen=True)
class Completion:
    """What the policy wrote; of an episode of several turns, its last one."""

    text: str
    """Its text, without the token that ends it."""
    num_tokens: int
    """How many tokens the policy made, in all turns, those that end them included."""
    ended: bool
    """Whether the policy ended it itself, with a stop token, rather than being cut off at the limit."""
    turns: Messages | None = None
    """Of an episode, the messages between the prompt and the last turn. None where the stage has no episodes."""


class Sample(NamedTuple):
    """A completion, and the prompt and the row that it belongs to."""

    row_index: int
    """Which row of its file it is, from 0. Messages count from 1, as lines do."""
    prompt: Prompt
    completion: Completion
    row: Row


def column_text(row: Row, column: str) -> str:
    """A carried column as text: a text as it is, a number or a truth value as JSON writes it."""
    columns = row.get("columns", {})
    if column not in columns:
        has = f"it has {', '.join(columns)}" if columns else "it has no columns"
        raise Unscorable(f"there is no column '{column}'; {has}", "Name it in `carry` of the source of the rows.")
    value = columns[column]
    return value if isinstance(value, str) else json.dumps(value)


def problem_of(name: str, row_index: int, row: Row, error: Unscorable) -> Problem:
    return problem_at(f"rewards.{name}", row_index, row, error)


def problem_at(where: str, row_index: int, row: Row, error: Unscorable) -> Problem:
    known = [f"{field} {row[field]!r}" for field in ("id", "source") if field in row]
    place = f"row {row_index + 1}" + (f" ({', '.join(known)})" if known else "")
    return Problem(where, f"{place}: {error.what}", error.hint)
