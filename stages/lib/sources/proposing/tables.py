"""Text in lines of fields: what stands between the fields, and whether the first line names them."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence

DELIMITERS = ("\t", ",", ";", "|")
ROWS_LOOKED_AT = 200
LONGEST_NAME_CHARACTERS = 40


def table_lines(content: str, delimiter: str, rows: int = ROWS_LOOKED_AT) -> list[list[str]]:
    """The fields of the first lines; quotes have a meaning unless tabs stand between the fields."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = content.split("\n", 4 * rows)[: 4 * rows]
    found: list[list[str]] = []
    try:
        for fields in csv.reader((line + "\n" for line in lines), delimiter=delimiter, quoting=quoting):
            if any(field.strip() for field in fields):
                found.append([field.strip("\r") for field in fields])
            if len(found) == rows:
                break
    except csv.Error:
        pass  # what was read so far is looked at; the reader will say what is wrong with the rest
    return found


def delimiter_of(content: str, *, strict: bool = False) -> str | None:
    """What stands between the fields of nearly every line; None where nothing does. With `strict`, of every line: text may
    hold commas by chance.
    """
    best: tuple[float, int, str] | None = None
    for order, delimiter in enumerate(DELIMITERS):
        widths = Counter(map(len, table_lines(content, delimiter)))
        if not widths:
            continue
        width, lines = widths.most_common(1)[0]
        share = lines / widths.total()
        least = 1.0 if strict else 0.8
        if width < 2 or share < least or (strict and delimiter != "\t" and widths.total() < 3):
            continue
        if best is None or (share, -order) > best[:2]:
            best = (share, -order, delimiter)
    return best[2] if best else None


FIRST_LABEL = re.compile(r"(__label__\S+|[A-Z][A-Z_]+(:\w+)?|[a-z]+:[a-z]+|[+-]?\d{1,2})[ ]+\S.*")


def label_first(content: str) -> bool:
    """Whether each line is a label, a space and a text: `NUM:date When was he born ?`, `__label__good It works .`"""
    lines = [line for line in content.split("\n", ROWS_LOOKED_AT)[:ROWS_LOOKED_AT] if line.strip()]
    found = [line.split(" ", 1)[0] for line in lines if FIRST_LABEL.fullmatch(line.rstrip("\r"))]
    return len(lines) > 3 and len(found) >= 0.98 * len(lines) and 1 < len(set(found)) <= len(lines) / 2


def header_of(lines: Sequence[Sequence[str]]) -> bool:
    """Whether the first line names the columns: its fields are short, differ from each other, are no numbers, and are not
    said again in the column below them.
    """
    first, *rest = lines
    names = [field.strip() for field in first]
    if len(set(names)) < len(names) or any(len(name) > LONGEST_NAME_CHARACTERS for name in names):
        return False
    if any(is_a_number(name) for name in names) or not all(names[1:]):
        return False
    for column, name in enumerate(names):
        below = [row[column].strip() for row in rest if column < len(row)]
        if name in below:
            return False
    return not any(len(name.split()) > 4 for name in names)


def is_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
