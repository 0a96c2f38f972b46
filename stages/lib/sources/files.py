"""Reads files from outside record by record. What cannot be read is a `Broken` record, never a crash.

Memory stays bounded: a record longer than `max_row_bytes` is passed over without being parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DataError, Problem
from stages.lib.sources.arrow_reader import read_parquet
from stages.lib.sources.csv_reader import read_csv, read_tsv
from stages.lib.sources.encodings import text_blocks
from stages.lib.sources.json_reader import read_json, read_jsonl
from stages.lib.sources.lines import (
    SNIPPET_BYTES,
    Broken,
    Damaged,
    Limits,
    Line,
    Record,
    lines_of,
    snippet_of,
    too_long,
)
from stages.lib.sources.other_files import refuse_unread_content

if TYPE_CHECKING:
    from stages.lib.sources.params import FilesSource


def read_text(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """The file, its paragraphs (between blank lines) or its lines, each as {"text"}."""
    if source.split_text == "line":
        for line in lines_of(text_blocks(path, source.encoding), limits):
            if line.content.strip():
                yield text_record(name, [line], limits)
        return
    for group in line_groups(
        lines_of(text_blocks(path, source.encoding), limits), whole=source.split_text != "paragraph", limits=limits
    ):
        yield text_record(name, group, limits)


def line_groups(lines: Iterator[Line], *, whole: bool, limits: Limits) -> Iterator[list[Line]]:
    """Lines up to a blank one, or all of them. A group that outgrows the limit is cut to one line that says so."""
    group: list[Line] = []
    size = 0
    found = False
    for line in lines:
        if not whole and not line.content.strip():
            if group:
                yield group
            group, size = [], 0
            continue
        found = True
        size += len(line.content) + 1
        if size > limits.row_bytes + 1:
            first = group[0] if group else line
            group = [Line(first.number, first.content[:SNIPPET_BYTES], too_long=True)]
        else:
            group.append(line)
    if group or (whole and not found):
        yield group


def text_record(name: str, lines: list[Line], limits: Limits) -> Record | Broken:
    where = f"{name}:{lines[0].number}" if lines else name
    if any(line.too_long for line in lines):
        return too_long(where, lines[0].content, limits)
    content = b"\n".join(line.content for line in lines)
    if not content.strip():
        return Broken(where, "empty_row", "")
    try:
        return Record(where, {"text": content.decode("utf-8")})
    except UnicodeDecodeError as error:
        return Broken(where, "not_utf8", f"byte {error.start}", snippet_of(content))


def read_conll(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """Sentences between blank lines, as {"tokens", "tags"}: one token a line, columns apart by tabs or spaces."""
    for group in line_groups(lines_of(text_blocks(path, source.encoding), limits), whole=False, limits=limits):
        record = text_record(name, group, limits)
        if isinstance(record, Broken):
            yield record
            continue
        tokens, tags = [], []
        for line in record.row["text"].split("\n"):
            if source.comment_prefix is not None and line.startswith(source.comment_prefix):
                continue
            columns = conll_columns(line)
            if columns[0].startswith("-DOCSTART-"):
                continue
            try:
                tokens.append(columns[source.token_column])
                tags.append(columns[source.tag_column])
            except IndexError:
                columns = []
            if len(columns) < 2:
                yield Broken(record.where, "bad_conll_row", repr(line), record.row["text"].replace("\n", " "))
                break
        else:
            if tokens:
                yield Record(record.where, {"tokens": tokens, "tags": tags})


def conll_columns(line: str) -> list[str]:
    """The columns of a line, apart by tabs, or by spaces where it has none. Other white space, such as the space that does
    not break in `10 000`, is a part of a token.
    """
    line = line.rstrip("\r")
    return line.split("\t") if "\t" in line else [part for part in line.split(" ") if part]


Reader = Callable[[Path, str, "FilesSource", Limits], Iterator[Record | Broken]]


READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "text": read_text,
    "conll": read_conll,
}
"""File type -> how it is read."""


def read_files(source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """The records of all files, in order. A file that breaks off is one broken record at the place where it does."""
    for path, name, file_type in source.files():
        where = name
        try:
            refuse_unread_content(path, file_type)
            for record in READERS[file_type](path, name, source, limits):
                where = record.where
                yield record
        except Damaged as damage:
            yield Broken(name, "damaged_file", f"{damage} (after {where})" if where != name else str(damage))
        except OSError as error:
            raise DataError(
                Problem(str(path), f"cannot be read: {error.strerror or error}", "Check the file.")
            ) from None
