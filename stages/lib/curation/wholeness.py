"""Whether a row still says something once it was rewritten."""

from __future__ import annotations

from stages.lib.curation.said import MESSAGE_FIELDS, TEXT_FIELDS, is_speech
from stages.lib.rows.blank import is_blank
from stages.lib.rows.canonical import Row


def emptied(row: Row) -> str | None:
    """`empty_field` if a text of the row, all of which are needed, shows nothing; a turn that calls or lists
    tools needs none."""
    texts = [row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)]
    turns = [message for name in MESSAGE_FIELDS for message in row.get(name, ()) if is_speech(message)]
    texts += [message["content"] for message in turns if not message.get("tool_calls") and not message.get("tools")]
    return "empty_field" if any(map(is_blank, texts)) else None


def alike(row: Row) -> str | None:
    """`identical_pair` if the answers of a pair have become the same."""
    return "identical_pair" if "rejected" in row and row["chosen"] == row["rejected"] else None
