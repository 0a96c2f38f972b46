"""Makes texts that look alike be alike, without changing what they say."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pipeline.settings.strict import Strict
from stages.lib.curation.said import change_message
from stages.lib.rows.canonical import FORMATS, Row


class Normalization(Strict):
    """What is made uniform in the texts of rows. Spans and questions are never rewritten: their offsets would move."""

    unicode: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode form. NFC only joins letters and their accents; NFKC also turns full-width and other variants into plain characters. null: as it is."""
    newlines: bool = True
    """Whether \\r\\n and \\r become \\n."""
    control_characters: bool = True
    """Whether control characters except newline and tab, and byte order marks, are taken out."""
    trailing_whitespace: bool = True
    """Whether spaces at the ends of lines, and blank lines at the ends of a text, are taken out."""


LINE_END = re.compile(r"\r\n?")


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


CONTROL_BUT_RETURN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")


TRAILING = re.compile(r"(?<![^\S\r\n])[^\S\r\n]+(?=\r?$)", re.MULTILINE)


def normalize_text(text: str, how: Normalization) -> str:
    if how.newlines:
        text = LINE_END.sub("\n", text)
    if how.control_characters:
        text = (CONTROL if how.newlines else CONTROL_BUT_RETURN).sub("", text)
    if how.unicode:
        text = unicodedata.normalize(how.unicode, text)
    if how.trailing_whitespace:
        text = TRAILING.sub("", text).strip("\r\n")
    return text


def normalize_row(row: Row, format: str, how: Normalization | None) -> Row:
    """The row with its texts made uniform; itself where the format has offsets."""
    if how is None:
        return row
    change = partial(normalize_text, how=how)
    rewritten = {name: normalized(row[name], change) for name in FORMATS[format].rewritten if name in row}
    return {**row, **rewritten}


def normalized(value: str | list[dict[str, Any]], change: Callable[[str], str]) -> str | list[dict[str, Any]]:
    """The text, or the messages with their texts, made uniform."""
    return change(value) if isinstance(value, str) else [change_message(message, change) for message in value]
