"""Completions as rewards see them, and the rows that they belong to. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import Problem
from stages.lib.on_policy.reward_values import Unscorable
from stages.lib.rows.canonical import Row
from stages.lib.text.chat_template import Prompt


@dataclass(frozen=True)
class Completion:
    """What the policy wrote."""

    text: str
    """Its text, without the token that ends it."""
    num_tokens: int
    """How many tokens the policy made, the one that ends it included."""
    ended: bool
    """Whether the policy ended it itself, with a stop token, rather than being cut off at the limit."""


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
    known = [f"{field} {row[field]!r}" for field in ("id", "source") if field in row]
    place = f"row {row_index + 1}" + (f" ({', '.join(known)})" if known else "")
    return Problem(f"rewards.{name}", f"{place}: {error.what}", error.hint)
