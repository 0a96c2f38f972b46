"""Reads files and data sets from outside record by record. What cannot be read is a `Broken` record, never a crash.

Memory stays bounded: a record longer than `max_row_bytes` is passed over without being parsed.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import DataError, Problem

if TYPE_CHECKING:
    import pyarrow

    from stages.lib.sources import DatasetSource, FilesSource, HubSource

BLOCK_BYTES = 1 << 20
COMPRESSED_BLOCK_BYTES = 1 << 12
"""Compressed bytes taken at once: zstd returns everything they hold, which can be thousands of times more."""
GZIP_FORMAT = 31
"""zlib's number for its largest window with gzip's header."""
CUT = "the compressed file ends before its end mark"
MAX_ZSTD_WINDOW_BYTES = 1 << 31
"""What `zstd --long=31` needs."""
SNIPPET_BYTES = 800
"""How much of a record is kept for the ledger's example: 200 characters of four bytes."""
MAX_DOCUMENT_BYTES = 1 << 30
"""A JSON document that is no list of rows is read whole; a larger one must be made into JSON lines."""
ARROW_BATCH_ROWS = 64
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One raw row, and where it stands: `train.jsonl:3`."""

    where: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """One record that cannot be read: `reason` is one of `conversion.REASONS`."""

    where: str
    reason: str
    detail: str
    snippet: str = ""


@dataclass(frozen=True)
class Limits:
    """`row_bytes`: the longest record that is parsed."""

    row_bytes: int


class Damaged(Exception):
    """The file ends early, or its compressed content is corrupt: nothing more can be read from it."""


# Bytes and lines


def blocks_of(path: Path) -> Iterator[bytes]:
    """The file's content, decompressed as its suffix says. Raises `Damaged` where it ends early or is corrupt."""
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from gzip_blocks(file)
        elif path.suffix == ".zst":
            yield from zstd_blocks(file)
        else:
            while block := file.read(BLOCK_BYTES):
                yield block


def gzip_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Decompressed members. Python's own reader keeps back what stands before the damage."""
    member, started = zlib.decompressobj(wbits=GZIP_FORMAT), False
    try:
        while compressed := file.read(COMPRESSED_BLOCK_BYTES):
            while compressed:
                started = True
                if block := member.decompress(compressed, BLOCK_BYTES):
                    yield block
                compressed = member.unconsumed_tail
                if member.eof:
                    compressed = member.unused_data.lstrip(b"\0")  # Zeros may fill up the space after a member.
                    member, started = zlib.decompressobj(wbits=GZIP_FORMAT), False
    except zlib.error as error:
        raise Damaged(str(error)) from None
    if started:
        raise Damaged(CUT)


def zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Decompressed frames. zstandard's own reader takes a cut file for a finished one, so the end is checked here."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    frame, started = decompressor.decompressobj(), False
    try:
        while compressed := file.read(COMPRESSED_BLOCK_BYTES):
            while compressed:
                started = True
                if block := frame.decompress(compressed):
                    yield block
                if not frame.eof:
                    break
                compressed = frame.unused_data
                frame, started = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from None
    if started:
        raise Damaged(CUT)


@dataclass(frozen=True)
class Line:
    """A line without its end. Of one that is too long only the beginning is kept."""

    number: int
    content: bytes
    too_long: bool = False
    quotes: int = 0
    """How many quotation marks a line that is too long has in all."""


def lines_of(blocks: Iterable[bytes], limits: Limits) -> Iterator[Line]:
    """The lines, numbered from 1. Raises `Damaged` where the blocks do."""
    number, pending, passed_over, quotes = 1, b"", False, 0
    for block in blocks:
        *complete, rest = block.split(b"\n")
        for part in complete:
            if passed_over:
                yield Line(number, pending, too_long=True, quotes=quotes + part.count(b'"'))
            else:
                yield whole_line(number, pending + part, limits)
            number, pending, passed_over = number + 1, b"", False
        if passed_over:
            quotes += rest.count(b'"')
        else:
            pending += rest
            if len(pending) > limits.row_bytes:
                quotes, passed_over = pending.count(b'"'), True
                pending = pending[:SNIPPET_BYTES]
    if pending:
        yield Line(number, pending, True, quotes) if passed_over else whole_line(number, pending, limits)


def whole_line(number: int, content: bytes, limits: Limits) -> Line:
    if number == 1:
        content = content.removeprefix(UTF8_MARK)
    if len(content) > limits.row_bytes:
        return Line(number, content[:SNIPPET_BYTES], too_long=True, quotes=content.count(b'"'))
    return Line(number, content)


def snippet_of(content: bytes) -> str:
    return content[:SNIPPET_BYTES].decode("utf-8", "backslashreplace")


def too_long(where: str, content: bytes, limits: Limits) -> Broken:
    return Broken(where, "row_too_long", f"more than {limits.row_bytes:,} bytes", snippet_of(content))


# JSON


def parse_record(where: str, content: bytes) -> Record | Broken:
    """The mapping in `content`; a list becomes a mapping of its positions: {"0": ..., "1": ...}."""
    if not content.strip():
        return Broken(where, "empty_row", "")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(where, "not_utf8", f"byte {error.start}", snippet_of(content))
    except RecursionError:
        return Broken(where, "bad_json", "nested too deeply", snippet_of(content))
    except ValueError as error:
        return Broken(where, "bad_json", str(error), snippet_of(content))
    return as_record(where, value)


def as_record(where: str, value: Any) -> Record | Broken:
    if isinstance(value, list):
        value = {str(position): item for position, item in enumerate(value)}
    if not isinstance(value, dict):
        return Broken(where, "not_a_record", "", repr(value)[:SNIPPET_BYTES])
    if not value:
        return Broken(where, "empty_row", "", "{}")
    return Record(where, value)


def read_jsonl(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    for line in lines_of(blocks_of(path), limits):
        where = f"{name}:{line.number}"
        yield too_long(where, line.content, limits) if line.too_long else parse_record(where, line.content)


def read_json(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """The elements of a list, one by one; or a whole document, or the rows that `records` names in it."""
    blocks = blocks_of(path)
    first = next(blocks, b"").removeprefix(UTF8_MARK)
    if source.records is None and first.lstrip()[:1] == b"[":
        yield from read_json_list(chain(first, blocks), name, limits)
        return
    content = bytearray(first)
    for block in blocks:
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            hint = "Save its rows as JSON lines (.jsonl), which are read one by one."
            raise DataError(Problem(name, f"is one JSON document of more than {MAX_DOCUMENT_BYTES:,} bytes", hint))
    try:
        document = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Broken(f"{name}:1", "not_utf8", f"byte {error.start}", snippet_of(bytes(content)))
    except (ValueError, RecursionError) as error:
        detail = str(error)
        if detail.startswith("Extra data"):
            detail += "; if each line is a row of its own, set file_type: jsonl"
        yield Broken(f"{name}:1", "bad_json", detail, snippet_of(bytes(content)))
    else:
        for where, value in records_in(document, source.records.split(".") if source.records else [], name):
            if source.records and len(json.dumps(value)) > limits.row_bytes:
                yield Broken(where, "row_too_long", f"more than {limits.row_bytes:,} bytes")
            else:
                yield as_record(where, value)


def chain(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from blocks


def records_in(document: Any, keys: list[str], where: str) -> Iterator[tuple[str, Any]]:
    """(where, row) below the keys; `*` steps into every entry of a mapping, whose name becomes the row's `key`."""
    if keys and isinstance(document, dict):
        key, *rest = keys
        if key == "*":
            for entry, value in document.items():
                for place, row in records_in(value, rest, f"{where}:{entry}"):
                    yield place, {"key": entry, **row} if isinstance(row, dict) else row
        elif key in document:
            yield from records_in(document[key], rest, f"{where}:{key}")
        else:
            known = ", ".join(list(document)[:10])
            raise DataError(Problem(where, f"has no '{key}', which `records` names", f"It has: {known}."))
    elif keys:
        raise DataError(Problem(where, f"is no mapping with '{keys[0]}', which `records` names", "Correct `records`."))
    elif isinstance(document, list):
        yield from ((f"{where}[{index}]", value) for index, value in enumerate(document))
    else:
        yield where, document


STRUCTURE = re.compile(rb'["\[\]{},]')
IN_STRING = re.compile(rb'["\\\n]')


class ListScanner:
    """Cuts a top-level JSON list into its elements by counting brackets, without parsing them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.depth = 0
        self.in_string = False
        self.escaped = False
        self.line = 1
        self.element = bytearray()
        self.element_line = 1
        self.too_long = False
        self.broke_off = False
        """Whether the element that was last returned ended within a string."""
        self.ended = False

    def feed(self, block: bytes) -> Iterator[Line]:
        """The elements that end in this block, with the number of the line they start on."""
        position = 0
        while position < len(block) and not self.ended:
            if self.escaped:
                stop, token, self.escaped = position, b"", False
            else:
                match = (IN_STRING if self.in_string else STRUCTURE).search(block, position)
                stop, token = (match.start(), match.group()) if match else (len(block) - 1, b"")
            part, position = block[position : stop + 1], stop + 1
            self.line += part.count(b"\n")
            if self.in_string:
                yield from self.within_string(part, token)
            else:
                yield from self.outside_string(part, token)

    def within_string(self, part: bytes, token: bytes) -> Iterator[Line]:
        self.escaped = token == b"\\"
        self.in_string = token not in (b'"', b"\n")
        self.add(part)
        if (
            token == b"\n"
        ):  # No string may hold a bare line end: its closing quote is missing, and the element ends here.
            yield self.finish(broke_off=True)
            self.depth = 1

    def outside_string(self, part: bytes, token: bytes) -> Iterator[Line]:
        before, self.depth = self.depth, self.depth + (token in (b"[", b"{")) - (token in (b"]", b"}"))
        self.in_string = token == b'"'
        if before == 0:
            self.element_line = self.line
        elif self.depth == 0 and token == b"]":
            self.add(part[:-1])
            self.ended = True
            if self.element.strip():
                yield self.finish()
        elif self.depth == 1 and token == b",":
            self.add(part[:-1])
            yield self.finish()
        else:
            self.depth = max(self.depth, 1)
            self.add(part)

    def add(self, part: bytes) -> None:
        if not self.too_long:
            self.element += part
            if len(self.element) > self.limits.row_bytes:
                del self.element[SNIPPET_BYTES:]
                self.too_long = True

    def finish(self, *, broke_off: bool = False) -> Line:
        self.broke_off = broke_off
        element = Line(self.element_line, bytes(self.element), self.too_long)
        self.element, self.element_line, self.too_long = bytearray(), self.line, False
        return element


def read_json_list(blocks: Iterable[bytes], name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The elements of a top-level list, each parsed by itself, so that a broken one spoils no other."""
    scanner = ListScanner(limits)
    in_rest = False
    for block in blocks:
        for element in scanner.feed(block):
            if in_rest and element.content.strip()[:1] not in (b"{", b"["):
                continue  # the rest of an element that broke off within a string
            in_rest = scanner.broke_off
            yield from read_element(element, name, limits)
    if not scanner.ended:
        if scanner.element.strip():
            element = scanner.finish()
            ending = element.content.rstrip().removesuffix(b"]")
            yield from read_element(Line(element.number, ending, element.too_long), name, limits)
        yield Broken(f"{name}:{scanner.line}", "damaged_file", "the list does not end")


def read_element(element: Line, name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The row in an element. Of one that does not parse, lines that look like the beginning of another are tried alone:
    a missing brace makes an element swallow those after it."""
    space = element.content[: len(element.content) - len(element.content.lstrip())]
    content, line = element.content.strip(), element.number + space.count(b"\n")
    if element.too_long:
        yield too_long(f"{name}:{line}", content, limits)
        return
    whole = parse_record(f"{name}:{line}", content)
    indent = space.rpartition(b"\n")[2]
    pieces = re.split(rb"\n(?=" + indent + rb"[{\[])", content)
    if isinstance(whole, Record) or whole.reason != "bad_json" or len(pieces) == 1:
        yield whole
        return
    for piece in pieces:
        yield parse_record(f"{name}:{line}", piece.strip().rstrip(b",").strip())
        line += piece.count(b"\n") + 1


# CSV


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
    yield from read_table(path, name, limits, has_header=source.has_header, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """Rows of a file with tabs between the fields. Quotes have no meaning in it."""
    yield from read_table(path, name, limits, has_header=source.has_header, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_table(
    path: Path, name: str, limits: Limits, *, has_header: bool, delimiter: str, quoting: int
) -> Iterator[Record | Broken]:
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))
    names: list[str] | None = None
    first_line: int | None = 1
    while first_line is not None:
        start, first_line = first_line, None
        lines = CsvLines(dropwhile(lambda line: line.number < start, lines_of(blocks_of(path), limits)), limits)  # noqa: B023
        for where, found in table_records(lines, name, delimiter, quoting, limits):
            if isinstance(found, int):
                first_line = found
            elif isinstance(found, Broken):
                yield found
            elif names is None and has_header:
                names = found
            else:
                snippet = snippet_of(lines.record[0].content)
                yield table_row(where, found, names or [str(position) for position in range(len(found))], snippet)


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


# Plain text and CoNLL


def read_text(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """The file, its paragraphs (between blank lines) or its lines, each as {"text"}."""
    if source.split_text == "line":
        for line in lines_of(blocks_of(path), limits):
            if line.content.strip():
                yield text_record(name, [line], limits)
        return
    for group in line_groups(lines_of(blocks_of(path), limits), whole=source.split_text != "paragraph", limits=limits):
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
    for group in line_groups(lines_of(blocks_of(path), limits), whole=False, limits=limits):
        record = text_record(name, group, limits)
        if isinstance(record, Broken):
            yield record
            continue
        tokens, tags = [], []
        for line in record.row["text"].split("\n"):
            columns = line.rstrip("\r").split("\t") if "\t" in line else line.split()
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


# Arrow


def read_parquet(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        file: Any = path
        if path.suffix in (".gz", ".zst"):
            for block in blocks_of(path):
                unpacked.write(block)
            file = unpacked
            unpacked.seek(0)
        start = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=ARROW_BATCH_ROWS):
                    yield from arrow_rows(batch, name, start, limits)
                    start += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise Damaged(str(error)) from None


def arrow_rows(
    batch: pyarrow.RecordBatch,
    name: str,
    start: int,
    limits: Limits,
    names: dict[str, Callable[[Any], Any]] | None = None,
) -> Iterator[Record | Broken]:
    """The rows of a batch, numbered from `start` + 1. Oversized ones are passed over before they become objects."""
    import pyarrow

    for index in range(batch.num_rows):
        where = f"{name}:{start + index + 1}"
        one = batch.slice(index, 1)
        if one.nbytes > limits.row_bytes:
            yield Broken(where, "row_too_long", f"{one.nbytes:,} bytes")
            continue
        try:
            row = {column: readable(value) for column, value in one.to_pylist()[0].items()}
        except UnicodeDecodeError as error:
            yield Broken(where, "not_utf8", f"byte {error.start}", snippet_of(bytes(error.object)))
            continue
        except (pyarrow.ArrowException, ValueError) as error:
            yield Broken(where, "wrong_type", str(error))
            continue
        for column, name_of in (names or {}).items():
            row[column] = name_of(row[column])
        if all(value is None for value in row.values()):
            yield Broken(where, "empty_row", "")
        else:
            yield Record(where, row)


def readable(value: Any) -> Any:
    """The value with bytes decoded, all the way down. Raises `UnicodeDecodeError`."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {name: readable(item) for name, item in value.items()}
    return value


def read_dataset(source: DatasetSource, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    hint = "Name a folder that `datasets`' save_to_disk wrote."
    try:
        loaded = datasets.load_from_disk(str(source.path))
    except Exception as error:  # the library raises many kinds for a folder that is not whole
        raise DataError(Problem(str(source.path), f"cannot be opened: {first_line(error)}", hint)) from None
    if isinstance(loaded, datasets.DatasetDict):
        known = ", ".join(loaded)
        if source.split is None:
            raise DataError(Problem(str(source.path), f"has several splits: {known}", "Name one as `split`."))
        if source.split not in loaded:
            raise DataError(Problem(str(source.path), f"has no split '{source.split}'", f"It has: {known}."))
        loaded = loaded[source.split]
    elif source.split is not None:
        raise DataError(Problem(str(source.path), "has no splits", "Leave `split` out."))
    yield from dataset_rows(loaded, source.path.name, limits)


def read_hub(source: HubSource, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a data set of the Hugging Face hub, at exactly the revision that the recipe names."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # network, authorization, missing split or config: all are told alike
        hint = "Check the id, the revision, the split and the config, and that this machine reaches the hub."
        where = f"{source.dataset}@{source.revision}"
        raise DataError(Problem(where, f"cannot be loaded: {first_line(error)}", hint)) from None
    yield from dataset_rows(loaded, source.dataset, limits)


def dataset_rows(dataset: Any, name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a `datasets.Dataset`; numbers of class labels become their names."""
    import datasets
    import pyarrow

    def namer(feature: datasets.ClassLabel) -> Callable[[Any], Any]:
        return lambda value: feature.int2str(value) if isinstance(value, int) and value >= 0 else None

    names = {
        column: namer(feature)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    start = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=ARROW_BATCH_ROWS):
            for batch in table.to_batches():
                yield from arrow_rows(batch, name, start, limits, names)
                start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield Broken(name, "damaged_file", f"{first_line(error)} (after row {start})")


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
            for record in READERS[file_type](path, name, source, limits):
                where = record.where
                yield record
        except Damaged as damage:
            yield Broken(name, "damaged_file", f"{damage} (after {where})" if where != name else str(damage))
        except OSError as error:
            raise DataError(
                Problem(str(path), f"cannot be read: {error.strerror or error}", "Check the file.")
            ) from None
