"""Reads CSV and TSV files, in which one unclosed quote may not cost more than its own row."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DataError, Problem
from stages.lib.sources.encodings import text_blocks
from stages.lib.sources.lines import Broken, Limits, Line, Record, lines_of, snippet_of, too_long

if TYPE_CHECKING:
    from stages.lib.sources.params import FilesSource


MANY_LINES = 10
"""A field of more lines than this may be the work of a quote that was never closed, so it is said."""


SPANS_MANY_LINES = (
    f"a field spans more than {MANY_LINES} lines: look whether a quotation mark before it was never closed"
)


class RecordTooLong(Exception):
    """A CSV record, which quotes may carry over many lines, outgrew the limit."""


class CsvLines:
    """Lines for `csv.reader`. Bytes that are no UTF-8 pass as surrogates, so that they spoil only their own record."""

    def __init__(self, lines: Iterator[Line], limits: Limits) -> None:
        self.lines = lines
        self.limits = limits
        self.record: list[Line] = []
        """The lines of the record that is being read."""
        self.record_bytes = 0
        self.again: list[Line] = []
        """Lines to be read a second time, the next one last."""

    def begin_record(self) -> None:
        self.record, self.record_bytes = [], 0

    def __iter__(self) -> CsvLines:
        return self

    def next_line(self) -> Line:
        return self.again.pop() if self.again else next(self.lines)

    def __next__(self) -> str:
        line = self.next_line()
        self.record.append(line)
        self.record_bytes += len(line.content) + 1
        if line.too_long or self.record_bytes > self.limits.row_bytes:
            raise RecordTooLong
        return line.content.decode("utf-8", "surrogateescape") + "\n"

    def retry_after_first_line(self) -> None:
        """A quote in the record's first line was never closed, or in the wrong place: the other lines are read again."""
        self.again += reversed(self.record[1:])

    def skip_record(self) -> bool:
        """Passes over the rest of a record that is too long: up to where every quote is closed. False if none is."""
        quotes = sum(line.quotes if line.too_long else line.content.count(b'"') for line in self.record)
        while quotes % 2:
            try:
                line = self.next_line()
            except StopIteration:
                return False
            quotes += line.quotes if line.too_long else line.content.count(b'"')
        return True


def read_csv(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """Rows of a CSV file, under the header's names; without header under their positions."""
    yield from read_table(path, name, source, limits, delimiter=source.delimiter or ",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """Rows of a file with tabs between the fields. Quotes have no meaning in it."""
    yield from read_table(path, name, source, limits, delimiter=source.delimiter or "\t", quoting=csv.QUOTE_NONE)


def read_table(
    path: Path, name: str, source: FilesSource, limits: Limits, *, delimiter: str, quoting: int
) -> Iterator[Record | Broken]:
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))
    names: list[str] | None = None
    header: list[str] = []
    first_line: int | None = 1
    while first_line is not None:
        start, first_line = first_line, None
        all_lines = lines_of(text_blocks(path, source.encoding), limits)
        lines = CsvLines(dropwhile(lambda line: line.number < start, all_lines), limits)  # noqa: B023
        for where, found in table_records(lines, name, delimiter, quoting, limits):
            if isinstance(found, int):
                first_line = found
            elif isinstance(found, Broken):
                yield found
            elif names is None and source.has_header:
                header = cut_fields(found, source.max_fields, delimiter)
                names = named_columns(header, where)
            else:
                fields = cut_fields(found, source.max_fields, delimiter)
                snippet = snippet_of(lines.record[0].content)
                if len(fields) > 1 and [fields[0].removeprefix("\ufeff"), *fields[1:]] == header:
                    yield Broken(where, "repeated_header", "", snippet)
                    continue
                row = table_row(where, fields, names or [str(position) for position in range(len(fields))], snippet)
                quoted = quoting == csv.QUOTE_NONE and source.max_fields is None and looks_quoted(fields, row)
                how = f"file_type: csv and delimiter: {json.dumps(delimiter, allow_nan=False)}"
                yield with_notices(row, len(lines.record), how if quoted else None)


def named_columns(header: list[str], where: str) -> list[str]:
    """The names of the columns: what the header says. Columns without a name, as spreadsheets write after the last one, go by
    their position where they are several.

    Raises `DataError` where two have one name: which of them is meant cannot be told.
    """
    counts = Counter(header)
    if repeated := [name for name, count in counts.items() if count > 1 and name.strip()]:
        listed = ", ".join(f"'{name}'" for name in repeated)
        what = f"has a header that names more than one column {listed}"
        hint = "Give each a name of its own in the file; or, if this line is a row, set has_header: false."
        raise DataError(Problem(where, what, hint))
    nameless = sum(not name.strip() for name in header) > 1
    return [str(position) if nameless and not name.strip() else name for position, name in enumerate(header)]


def looks_quoted(fields: list[str], row: Record | Broken) -> bool:
    """Whether a field of a TSV file, in which quotes have no meaning, stands between two that would enclose it in CSV, or is
    the beginning or the end of one that goes over several lines.
    """
    whole = any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
    return whole or (isinstance(row, Broken) and sum(field.count('"') for field in fields) % 2 == 1)


def with_notices(row: Record | Broken, num_lines: int, quoted: str | None) -> Record | Broken:
    """The row with what the user should know of its quotation marks. `quoted` says how fields between such are read."""
    if isinstance(row, Broken):
        if row.reason != "bad_csv_row" or quoted is None:
            return row
        return replace(row, detail=f"{row.detail}; where quotation marks enclose fields, set {quoted}")
    found = [SPANS_MANY_LINES] if num_lines > MANY_LINES else []
    if quoted is not None:
        kept = "a field stands between quotation marks, which mean nothing in TSV and stay in it"
        found.append(f"{kept}; where they only enclose it, set {quoted}")
    return replace(row, noticed=tuple(found)) if found else row


def cut_fields(fields: list[str], most: int | None, delimiter: str) -> list[str]:
    """The fields, what follows the last one that may be as a part of it."""
    if most is None or len(fields) <= most:
        return fields
    return [*fields[: most - 1], delimiter.join(fields[most - 1 :])]


def table_records(
    lines: CsvLines, name: str, delimiter: str, quoting: int, limits: Limits
) -> Iterator[tuple[str, list[str] | Broken | int]]:
    """(where, fields) of each record, or why it has none. At the end the number of a line to start from once more, if a
    quote before it was never closed and so swallowed more than can be kept in memory."""
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        lines.begin_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except RecordTooLong:
            first = lines.record[0]
            where = f"{name}:{first.number}"
            yield where, too_long(where, first.content, limits)
            if quoting != csv.QUOTE_NONE and not lines.skip_record():
                yield where, first.number + 1
                return
        except csv.Error as error:
            first = lines.record[0]
            where = f"{name}:{first.number}"
            yield where, Broken(where, "bad_csv_row", str(error), snippet_of(first.content))
            lines.retry_after_first_line()
        else:
            yield f"{name}:{lines.record[0].number}", fields


def table_row(where: str, fields: list[str], names: list[str], snippet: str) -> Record | Broken:
    if not any(field.strip() for field in fields):
        return Broken(where, "empty_row", "", snippet)
    if len(fields) != len(names):
        return Broken(where, "bad_csv_row", f"{len(fields)} fields instead of {len(names)}", snippet)
    try:
        for field in fields:
            field.encode()
    except UnicodeEncodeError:
        return Broken(where, "not_utf8", "", snippet)
    return Record(where, dict(zip(names, fields, strict=True)))
