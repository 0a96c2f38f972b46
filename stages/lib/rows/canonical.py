"""The canonical rows of each format: what their texts are, what makes two equal, and how they are read and written.

    text         {"text"}
    chats        {"messages": [{"role", "content"}, ...]}
    prompts      {"prompt": [messages]}, the last of them the user's
    preferences  {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    unpaired_preferences
                 {"prompt": [messages], "completion": [messages], "label"}; `label` is true if the completion is desirable
    ratings      {"prompt": [messages], "completion": [messages], "ratings": {attribute: number, or null where it is not rated}}
    step_labels  {"prompt": [messages], "steps": [messages], "labels"}; a label a step: true, false, or null where it is not known
    labels       {"text", "label"}, of a pair of texts {"text", "text_pair", "label"}; `label` is null where it is not known yet
    spans        {"text", "spans": [{"start", "end", "label"}]}, half-open character offsets
    questions    {"id", "context", "question", "answers": [{"start", "text"}]}; no answers: cannot be answered; null: not known yet

A message has `role` (system, user, assistant or tool) and `content`, a text. An assistant's may have `reasoning_content`,
`tool_calls` ([{"name", "arguments"}], the arguments by name) and `train: false` where nothing is to be learned from it; a
tool's the `name` of the tool; the first system message the `tools` that may be called, as OpenAI lists them.

Any row may also have `id`, `group` (rows of one group stay on one side of the held-out split) and `source`; one of
preferences also `margin` (by how much the chosen answer is better) and `corruption` (how the rejected one was made).
A row may carry `columns` too (name -> text, number or truth value): what the source's `carry` takes along unchanged, such
as the answer that a reward compares a completion with; and an `annotation`: how sure the stage `annotate` was of what it
said, and what the row had said before. Rows of the stage `sample_preferences` have `sampled`: whose answers they hold, what
these scored, and of how many completions they are the best and the worst.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.store.artifact import Kind, canonical_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What stages need to know of one format."""

    rows_kind: Kind
    """Cleaned rows of one source."""
    mixed_kind: Kind
    """A data set with a training and a held-out side."""
    fields: tuple[str, ...]
    """What every row has; a row may have more, which says where it comes from."""
    texts: Callable[[Row], list[str]]
    """What filters judge, and what characters and tokens are counted of."""
    default_split: str
    """What rows must share to be kept on one side of the held-out split, if nothing else is said."""
    shared: dict[str, Callable[[Row], str]]
    """Name -> what rows may be kept on one side by."""
    parts: Callable[[Row], list[str]] = lambda row: []
    """What tells apart rows that share most of their text, such as a context: near-duplicates are alike in each of these."""
    rewritten: tuple[str, ...] = ()
    """Fields whose texts may be normalized; none where offsets point into them."""
    optional: tuple[str, ...] = ()
    """What a row may say besides."""

    def content(self, row: Row) -> str:
        """Equal for rows that say the same, whatever else is known of them."""
        said = [row[name] for name in self.fields] + [row[name] for name in self.optional if name in row]
        return canonical_json(said).decode()

    def split_key(self, row: Row, by: str) -> str:
        return self.content(row) if by == "content" and by not in self.shared else self.shared[by](row)


def text_of_message(message: Row) -> str:
    """All that a message holds as one text: reasoning, content, calls and tools."""
    listed = [
        json.dumps(each, ensure_ascii=False, allow_nan=False)
        for key in ("tool_calls", "tools")
        for each in message.get(key) or ()
    ]
    return "\n".join(part for part in (message.get("reasoning_content"), message["content"], *listed) if part)


def texts_of_messages(*names: str) -> Callable[[Row], list[str]]:
    return lambda row: [text_of_message(message) for name in names for message in row[name]]


def texts_in(*names: str) -> Callable[[Row], list[str]]:
    return lambda row: [row[name] for name in names]


def texts_of_pair(row: Row) -> list[str]:
    """A text, or both texts of a pair."""
    return [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]


def said_by_pair(row: Row) -> str:
    """Equal for a pair and its reverse: asked whether two texts say the same, the one gives the other away."""
    return canonical_json(sorted(texts_of_pair(row))).decode() if "text_pair" in row else str(row["text"])


def first_user_message(name: str) -> Callable[[Row], str]:
    return lambda row: next(message["content"] for message in row[name] if message["role"] == "user")


def said_in(name: str) -> Callable[[Row], list[str]]:
    """What the user says in a chat, and what the assistant says: system messages are often shared by all rows."""

    def parts(row: Row) -> list[str]:
        return [
            "\n\n".join(text_of_message(message) for message in row[name] if message["role"] == role)
            for role in ("user", "assistant")
        ]

    return parts


def field_text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


FORMATS: dict[str, Format] = {
    "text": Format(
        rows_kind=Kind.TEXT_ROWS,
        mixed_kind=Kind.TEXT,
        fields=("text",),
        texts=texts_in("text"),
        default_split="content",
        shared={"content": field_text("text")},
        rewritten=("text",),
    ),
    "chats": Format(
        rows_kind=Kind.CHAT_ROWS,
        mixed_kind=Kind.CHATS,
        fields=("messages",),
        texts=texts_of_messages("messages"),
        default_split="prompt",
        shared={"prompt": first_user_message("messages")},
        parts=said_in("messages"),
        rewritten=("messages",),
    ),
    "prompts": Format(
        rows_kind=Kind.PROMPT_ROWS,
        mixed_kind=Kind.PROMPTS,
        fields=("prompt",),
        texts=texts_of_messages("prompt"),
        default_split="prompt",
        shared={"prompt": first_user_message("prompt")},
        parts=said_in("prompt"),
        rewritten=("prompt",),
    ),
    "preferences": Format(
        rows_kind=Kind.PREFERENCE_ROWS,
        mixed_kind=Kind.PREFERENCES,
        fields=("prompt", "chosen", "rejected"),
        texts=texts_of_messages("prompt", "chosen", "rejected"),
        default_split="prompt",
        shared={"prompt": first_user_message("prompt")},
        parts=lambda row: [text_of_message(row["prompt"][-1]), *texts_of_messages("chosen", "rejected")(row)],
        rewritten=("prompt", "chosen", "rejected"),
    ),
    "unpaired_preferences": Format(
        rows_kind=Kind.UNPAIRED_PREFERENCE_ROWS,
        mixed_kind=Kind.UNPAIRED_PREFERENCES,
        fields=("prompt", "completion", "label"),
        texts=texts_of_messages("prompt", "completion"),
        default_split="prompt",
        shared={"prompt": first_user_message("prompt")},
        parts=lambda row: [text_of_message(row["prompt"][-1]), *texts_of_messages("completion")(row)],
        rewritten=("prompt", "completion"),
    ),
    "ratings": Format(
        rows_kind=Kind.RATING_ROWS,
        mixed_kind=Kind.RATINGS,
        fields=("prompt", "completion", "ratings"),
        texts=texts_of_messages("prompt", "completion"),
        default_split="prompt",
        shared={"prompt": first_user_message("prompt")},
        parts=lambda row: [text_of_message(row["prompt"][-1]), *texts_of_messages("completion")(row)],
        rewritten=("prompt", "completion"),
    ),
    "step_labels": Format(
        rows_kind=Kind.STEP_LABEL_ROWS,
        mixed_kind=Kind.STEP_LABELS,
        fields=("prompt", "steps", "labels"),
        texts=texts_of_messages("prompt", "steps"),
        default_split="prompt",
        shared={"prompt": first_user_message("prompt")},
        parts=lambda row: [text_of_message(row["prompt"][-1]), "\n\n".join(texts_of_messages("steps")(row))],
        rewritten=("prompt", "steps"),
    ),
    "labels": Format(
        rows_kind=Kind.LABEL_ROWS,
        mixed_kind=Kind.LABELS,
        fields=("text", "label"),
        texts=texts_of_pair,
        default_split="content",
        shared={"content": said_by_pair},
        parts=lambda row: texts_of_pair(row) if "text_pair" in row else [],
        rewritten=("text", "text_pair"),
        optional=("text_pair",),
    ),
    "spans": Format(
        rows_kind=Kind.SPAN_ROWS,
        mixed_kind=Kind.SPANS,
        fields=("text", "spans"),
        texts=texts_in("text"),
        default_split="content",
        shared={"content": field_text("text")},
    ),
    "questions": Format(
        rows_kind=Kind.QUESTION_ROWS,
        mixed_kind=Kind.QUESTIONS,
        fields=("context", "question", "answers"),
        texts=texts_in("context", "question"),
        default_split="context",
        shared={"context": field_text("context"), "prompt": field_text("question")},
        parts=texts_in("question"),
    ),
}


if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def format_of_kind(kind: Kind) -> str:
    """The name of the format whose cleaned rows or mixed data set `kind` is."""
    return next(name for name, known in FORMATS.items() if kind in (known.rows_kind, known.mixed_kind))


def format_of_row(row: Row) -> str:
    """The name of the format that a canonical row has: the one with most of its fields."""
    having = [name for name, known in FORMATS.items() if row.keys() >= set(known.fields)]
    return max(having, key=lambda name: len(FORMATS[name].fields))


def is_margin(value: Any) -> bool:
    """Whether it can be the margin of a pair: a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def judged_text(row: Row, format: str) -> str:
    """All texts of a row as one, for filters and near-duplicate search."""
    return "\n\n".join(FORMATS[format].texts(row))


def digest_text(text: str) -> bytes:
    """16 bytes: two texts of one data set share them by chance once in 10^38 pairs."""
    return hashlib.sha256(text.encode()).digest()[:16]


def content_digest(row: Row, format: str) -> bytes:
    """Equal for rows that say the same, whatever their `id`, `group` and `source`."""
    return digest_text(FORMATS[format].content(row))


def encode_row(row: Row) -> bytes:
    """One line of a `.jsonl` file."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Writes one row a line; returns how many."""
    count = 0
    with path.open("wb") as file:
        for row in rows:
            file.write(encode_row(row))
            count += 1
    return count


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that a stage wrote."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)
