"""Layouts of data from outside, and how a row of each becomes a canonical row, or a reason why it does not.

To add one: a function `convert(row, conversion) -> Row` that raises `Dropped`, a line in `LAYOUTS`, and a golden row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, Unusable, type_name
from stages.lib.sources.layouts_between import preference_between
from stages.lib.sources.layouts_chats import ALPACA_COLUMNS, alpaca, alpaca_rows, messages, rated_chat, sharegpt
from stages.lib.sources.layouts_labels import label, relation, text
from stages.lib.sources.layouts_preferences import preference_alpaca, preference_turns
from stages.lib.sources.layouts_prompts import prompts
from stages.lib.sources.layouts_questions import ANSWERABLE, IMPOSSIBLE, squad, squad_rows
from stages.lib.sources.layouts_spans import bio, pieces, spans
from stages.lib.sources.layouts_steps import math_shepherd, prm800k, stepwise
from stages.lib.sources.layouts_unpaired import rated_answer, unpaired_preference


def one_row(row: Row) -> Iterable[Row]:
    return (row,)


@dataclass(frozen=True)
class Layout:
    """How the raw rows of a source are laid out, and which format they become."""

    format: str
    convert: Callable[[Row, Conversion], Row]
    columns: tuple[str, ...]
    """Our names of the columns it reads: the keys that `columns` may rename."""
    summary: str
    options: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Other columns that it reads, under the names that they have."""
    expand: Callable[[Row], Iterable[Row | Unusable]] = one_row
    """Splits one raw record into several raw rows. It raises nothing, since that would end it: what cannot be read is `Unusable`."""


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """The row under our names: `columns` maps ours to theirs; columns it does not mention keep their name."""
    renamed = {name: value for name, value in row.items() if name not in columns}
    for ours, theirs in columns.items():
        if theirs in row:
            renamed[ours] = row[theirs]
    return renamed


def convert_record(
    record: Row, layout: Layout, columns: Mapping[str, str], conversion: Conversion, carry: Sequence[str] = ()
) -> Iterator[tuple[Any, Row | Dropped]]:
    """The canonical rows of one raw record, or why there are none, each with the raw row it comes from.

    `carry` names columns of the raw record, or of the rows it is split into, that each row keeps.
    """
    renamed = rename(record, columns)
    try:
        refuse_bytes(renamed, record, layout, columns, carry)
    except Dropped as reason:
        yield renamed, reason
        return
    for raw in layout.expand(renamed):
        if isinstance(raw, Unusable):
            yield raw
            continue
        conversion.begin_row()
        try:
            # Carried columns go by the names in the data, so they are looked up before anything is renamed.
            carried = carried_columns(record if raw is renamed else {**record, **raw}, carry)
            row = with_common_fields(layout.convert(raw, conversion), raw, columns, carried)
        except Dropped as reason:
            yield raw, reason
        else:
            for name in unread(record, raw, layout, columns, (*carry, *conversion.rating_columns)):
                conversion.notice(f"column '{name}' is not read")
            conversion.finish_row()
            yield raw, row


def refuse_bytes(renamed: Row, record: Row, layout: Layout, columns: Mapping[str, str], carry: Sequence[str]) -> None:
    """Raises `Dropped` where a column that is read holds bytes, which readers leave where they are no UTF-8."""
    read = {"id", "group"} & columns.keys() | {*layout.columns, *layout.also}
    wanted = {columns.get(name, name): renamed.get(name) for name in sorted(read)}
    wanted |= {name: column_in(record, name) for name in carry}
    for name, value in wanted.items():
        if holds_bytes(value):
            hint = "name a column of text in `columns`, or write this one as UTF-8"
            raise Dropped("not_utf8", f"column '{name}' holds bytes that are no text: {hint}")


def holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(holds_bytes, value.values()))
    return isinstance(value, bytes) or (isinstance(value, list) and any(map(holds_bytes, value)))


def unread(record: Row, raw: Row, layout: Layout, columns: Mapping[str, str], carry: Sequence[str]) -> list[str]:
    """The columns that hold something and are read by nothing: of a raw row, and of its record those that renamed ones hide."""
    carried = {each.partition(".")[0] if each not in record else each for each in carry}
    read = {"id", *layout.columns, *layout.also, *columns, *columns.values(), *carry, *carried}
    hidden = {name for name in columns if name in record} - {*columns.values(), *carry}
    found = {**{name: record[name] for name in hidden}, **{n: value for n, value in raw.items() if n not in read}}
    return [name for name, value in found.items() if value not in (None, "", [], {})]


def carried_columns(raw: Row, carry: Sequence[str]) -> Row:
    """The columns that `carry` names, as they are."""
    values = {name: column_in(raw, name) for name in carry}
    for name, value in values.items():
        if value is None:
            raise Dropped("missing_field", f"{name}, which carry names")
        if not isinstance(value, str | int | float):
            raise Dropped("wrong_type", f"{name} is {type_name(value)}, which cannot be carried")
        if isinstance(value, float) and not math.isfinite(value):
            raise Dropped("wrong_type", f"{name} is {value}, which cannot be carried")
    return values


def column_in(raw: Row, name: str) -> Any:
    """The value of a column, or, where there is none of this name, of what its dots lead to: `reward_model.ground_truth`."""
    if name in raw:
        return raw[name]
    value: Any = raw
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def with_common_fields(row: Row, raw: Row, columns: Mapping[str, str], carried: Row) -> Row:
    """The row with its `id`, with a `group` where `columns` names the field that holds it, and with what is carried."""
    common = {}
    for name in ("id", "group"):
        value = raw.get(name)
        if name == "group" and name not in columns:
            continue
        if isinstance(value, str | int) and not isinstance(value, bool):
            common[name] = str(value)
        elif name in columns:
            raise Dropped("missing_field" if value is None else "wrong_type", columns[name])
    row = {**common, **row, **({"columns": carried} if carried else {})}
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Dropped("not_utf8") from None
    return row


SHAREGPT_COLUMNS = ("messages", "system", "tools", "functions")


CHAT_COLUMNS = ("conversations",)


LAYOUTS: dict[str, Layout] = {
    "text": Layout("text", text, ("text",), "a text"),
    "alpaca": Layout(
        "chats",
        alpaca,
        (*ALPACA_COLUMNS, "instances"),
        "instruction, input, output, history, system; or instances of input and output",
        expand=alpaca_rows,
    ),
    "messages": Layout("chats", messages, SHAREGPT_COLUMNS, "a list of turns with role and content"),
    "sharegpt": Layout(
        "chats", sharegpt, SHAREGPT_COLUMNS, "conversations: turns with from and value; tools", also=CHAT_COLUMNS
    ),
    "rated_chat": Layout(
        "chats",
        rated_chat,
        (*SHAREGPT_COLUMNS, "answer", "label"),
        "a chat and whether it is good: the good ones",
        options=("turns_in_text",),
    ),
    "prompts": Layout(
        "prompts",
        prompts,
        ("prompt", "system", "tools", "functions", "history", "instruction", "input"),
        "a prompt as text or turns, or instruction and input; system, tools, history",
        options=("turns_in_text",),
    ),
    "preference_alpaca": Layout(
        "preferences",
        preference_alpaca,
        (*ALPACA_COLUMNS, "chosen", "rejected", "margin"),
        "instruction, input, history, and chosen and rejected, or output = [better, ..., worse]",
    ),
    "preference_between": Layout(
        "preferences",
        preference_between,
        ("instruction", "input", "history", *SHAREGPT_COLUMNS, "output_1", "output_2", "preference", "margin"),
        "instruction, input and history, or messages; output_1 and output_2, and which of them is better: 1, 2, a number between or a word",
        options=("first_answer", "second_answer", "turns_in_text"),
    ),
    "preference_chat": Layout(
        "preferences",
        preference_turns,
        (*SHAREGPT_COLUMNS, "chosen", "rejected", "margin"),
        "a prompt, and chosen and rejected as turns; or two whole conversations or Human:/Assistant: transcripts",
        options=("turns_in_text",),
        also=(*CHAT_COLUMNS, "prompt"),
    ),
    "unpaired_preference": Layout(
        "unpaired_preferences",
        unpaired_preference,
        ("prompt", "completion", *SHAREGPT_COLUMNS, "instruction", "input", "history", "label"),
        "a prompt and a completion, or a chat, and whether the last answer is desirable: both kinds are kept",
        options=("turns_in_text",),
        also=CHAT_COLUMNS,
    ),
    "rated_answer": Layout(
        "ratings",
        rated_answer,
        ("prompt", "completion", *SHAREGPT_COLUMNS, "instruction", "input", "history", "ratings"),
        "a prompt and a completion, or a chat, and the ratings of the last answer: a number, or one for each of several attributes",
        options=("turns_in_text", "rating_columns"),
        also=CHAT_COLUMNS,
    ),
    "stepwise": Layout(
        "step_labels",
        stepwise,
        ("prompt", "completions", *SHAREGPT_COLUMNS, "instruction", "input", "history", "labels"),
        "a prompt, the steps of an answer, and whether each of them is right",
        options=("turns_in_text",),
        also=CHAT_COLUMNS,
    ),
    "math_shepherd": Layout(
        "step_labels",
        math_shepherd,
        ("input", "label"),
        "Math-Shepherd's texts of steps, marked and labelled",
        also=("task",),
    ),
    "prm800k": Layout(
        "step_labels",
        prm800k,
        ("question", "label"),
        "PRM800K's problems, and steps of which one each is chosen",
        also=("labeler", "timestamp", "generation", "is_quality_control_question", "is_initial_screening_question"),
    ),
    "label": Layout(
        "labels",
        label,
        ("text", "text_pair", "label"),
        "a text, or a pair of texts (text and text_pair), and its label",
        options=("unlabelled", "no_label"),
    ),
    "relation": Layout(
        "labels",
        relation,
        ("tokens", "head", "tail", "label"),
        "tokens, two entities and their relation",
        options=("token_separator", "no_label"),
    ),
    "spans": Layout("spans", spans, ("text", "spans"), "a text and its spans", options=("span_offsets",)),
    "bio": Layout(
        "spans",
        bio,
        ("tokens", "tags"),
        "tokens with BIO, BIOES, BILOU, BMES, BMEO or BMEWO tags, as in CoNLL files",
        options=("token_separator", "strip_segment_digit"),
    ),
    "pieces": Layout("spans", pieces, ("pieces",), "a text in pieces, some of them entities"),
    "squad": Layout(
        "questions",
        squad,
        ("context", "question", "answers", "data", "paragraphs", "qas"),
        "SQuAD's and CMRC's nested documents, or one question a row",
        options=("unlabelled",),
        expand=squad_rows,
        also=(*IMPOSSIBLE, *ANSWERABLE),
    ),
}


def layouts_giving(format: str) -> list[str]:
    """The layouts whose rows are of the format, in the order of the table."""
    return [name for name, layout in LAYOUTS.items() if layout.format == format]
