"""Text in lines of fields: what stands between the fields, and whether the first line names them."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence

DELIMITERS = ("\t", ",", ";", "|")
ROWS_LOOKED_AT = 200
LONGEST_NAME_CHARACTERS = 40


def table_lines(content: str, delimiter: str, rows: int = ROWS_LOOKED_AT, *, quoted: bool = False) -> list[list[str]]:
    """The fields of the first lines; quotes have a meaning unless tabs stand between the fields, and there where `quoted`."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" and not quoted else csv.QUOTE_MINIMAL
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
        quoted = delimiter == "\t" and tabs_between_quotes(content)
        widths = Counter(map(len, table_lines(content, delimiter, quoted=quoted)))
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


ENCLOSED = re.compile(r'(?:^|(?<=\t))"(?:[^"]|"")*"(?=\t|\r?$)', re.MULTILINE)
"""A field between quotation marks, those within it doubled."""


def tabs_between_quotes(content: str) -> bool:
    """Whether quotation marks enclose fields between tabs, as spreadsheets and pandas write them where a field holds a tab, a
    line end or such a mark itself. Marks that a text has of its own are not doubled, or do not enclose a whole field.
    """
    fields = ENCLOSED.findall(content)
    plain = Counter(map(len, table_lines(content, "\t")))
    # Where each line has as many fields as the others, no field goes on in the next line: marks of a text may do.
    within = [field for field in fields if len(plain) > 1 or not {"\t", "\n"} & set(field)]
    if not any("\t" in field or "\n" in field or '""' in field[1:-1] for field in within):
        return always_enclosed(content)
    found: list[int] = []
    lines = content.split("\n", 4 * ROWS_LOOKED_AT)[: 4 * ROWS_LOOKED_AT]
    try:
        for fields in csv.reader((line + "\n" for line in lines), delimiter="\t", strict=True):
            found += [len(fields)] if fields else []
            if len(found) == ROWS_LOOKED_AT:
                break
    except csv.Error as error:
        if "unexpected end" not in str(error):  # what is looked at may end within a field
            return False
    widths = Counter(found)
    return len(found) > 1 and widths.most_common(1)[0][1] >= 0.8 * len(found)


def always_enclosed(content: str) -> bool:
    """Whether marks enclose each field of a column that is no number."""
    rows = [row for row in table_lines(content, "\t") if len(row) > 1]
    columns = [[row[column] for row in rows if column < len(row)] for column in range(len(rows[0]) if rows else 0)]
    return len(rows) > 2 and any(
        all(len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1] for field in column)
        for column in columns
    )


FIRST_LABEL = re.compile(r"(__label__\S+|[A-Z][A-Z_]+(:\w+)?|[a-z]+:[a-z]+|[+-]?\d{1,2})[ ]+\S.*")


def label_first(content: str) -> bool:
    """Whether each line is a label, a space and a text: `NUM:date When was he born ?`, `__label__good It works .`"""
    lines = [line for line in content.split("\n", ROWS_LOOKED_AT)[:ROWS_LOOKED_AT] if line.strip()]
    found = [line.split(" ", 1)[0] for line in lines if FIRST_LABEL.fullmatch(line.rstrip("\r"))]
    return len(lines) > 3 and len(found) >= 0.98 * len(lines) and 1 < len(set(found)) <= len(lines) / 2


def header_of(lines: Sequence[Sequence[str]]) -> bool:
    """Whether the first line names the columns: its fields are short, are no numbers, and are not said again in the column
    below them, but where the whole line is. Names that stand twice are names all the same, which the reader refuses; those
    of several words only where numbers stand below one of them.
    """
    first, *rest = lines
    names = [field.strip() for field in first]
    named = [name for name in names if name]
    if any(len(name) > LONGEST_NAME_CHARACTERS or is_a_number(name) for name in names):
        return False
    if len(set(named)) < len(named) and any(" " in name for name in named) and not numbers_below(rest):
        return False
    if not all(names[1:]) and not trailing_gaps(names, rest):
        return False
    rest = [row for row in rest if len(row) < 2 or row != first]
    for column, name in enumerate(names):
        below = [row[column].strip() for row in rest if column < len(row)]
        if name and name in below:
            return False
    return not any(len(name.split()) > 4 for name in names)


def numbers_below(rest: Sequence[Sequence[str]]) -> bool:
    """Whether the rows have a column of numbers alone."""
    columns = [[row[column] for row in rest if column < len(row)] for column in range(len(rest[0]) if rest else 0)]
    return any(all(map(is_a_number, column)) for column in columns)


def trailing_gaps(names: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Whether the fields without a name are the last ones, and hold nothing below, as spreadsheets write empty columns."""
    last = max(index for index, name in enumerate(names) if name) + 1 if any(names) else 0
    return last > 0 and all(names[1:last]) and not any(field.strip() for row in rest for field in row[last:])


def is_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
