"""Reads JSON lines, lists and documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Problem
from stages.lib.sources.encodings import text_blocks
from stages.lib.sources.lines import (
    SNIPPET_BYTES,
    UTF8_MARK,
    Broken,
    Limits,
    Line,
    Record,
    lines_of,
    snippet_of,
    too_long,
)
from stages.lib.sources.strict_json import Document, Fault, RepeatedKey, Repeating, parse_json

if TYPE_CHECKING:
    from stages.lib.sources.params import FilesSource


MAX_DOCUMENT_BYTES = 1 << 30
"""A JSON document that is no list of rows is read whole; a larger one must be made into JSON lines."""


def parse_record(where: str, content: bytes) -> Record | Broken:
    """The mapping in `content`; a list becomes a mapping of its positions: {"0": ..., "1": ...}."""
    if not content.strip():
        return Broken(where, "empty_row", "")
    try:
        value = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(where, "not_utf8", f"byte {error.start}", snippet_of(content))
    except RecursionError:
        return Broken(where, "bad_json", "nested too deeply", snippet_of(content))
    except RepeatedKey as error:
        return Broken(where, "repeated_key", str(error), snippet_of(content))
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
    for line in lines_of(text_blocks(path, source.encoding), limits):
        where = f"{name}:{line.number}"
        yield too_long(where, line.content, limits) if line.too_long else parse_record(where, line.content)


def read_json(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    """The elements of a list, one by one; or a whole document, or the rows that `records` names in it."""
    blocks = text_blocks(path, source.encoding)
    first = next(blocks, b"").removeprefix(UTF8_MARK)
    while not first.strip() and (block := next(blocks, b"")):
        first += block
    if source.records is None and first.lstrip()[:1] == b"[":
        hint = "if each line is a row of its own, set file_type: jsonl" if begins_with_list_lines(first) else ""
        for found in read_json_list(chain(first, blocks), name, limits):
            bare = isinstance(found, Broken) and found.reason == "not_a_record"
            yield replace(found, detail=hint) if bare else found
        return
    content = bytearray(first)
    for block in blocks:
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            hint = "Save its rows as JSON lines (.jsonl), which are read one by one."
            raise DataError(Problem(name, f"is one JSON document of more than {MAX_DOCUMENT_BYTES:,} bytes", hint))
    try:
        document = Document(bytes(content))
    except UnicodeDecodeError as error:
        yield Broken(f"{name}:1", "not_utf8", f"byte {error.start}", snippet_of(bytes(content)))
    except (ValueError, RecursionError) as error:
        detail = str(error)
        if detail.startswith("Extra data"):
            detail += extra_data_hint(bytes(content))
        yield Broken(f"{name}:1", "bad_json", detail, snippet_of(bytes(content)))
    else:
        yield from document_rows(document, source.records, name, limits)


def begins_with_list_lines(content: bytes) -> bool:
    """Whether the first line is a list by itself, and another follows."""
    line, _, rest = content.lstrip().partition(b"\n")
    return rest.lstrip()[:1] == b"[" and isinstance(parse_record("", line), Record)


def extra_data_hint(content: bytes) -> str:
    """What to do with a file that holds more than one value."""
    first_line = parse_record("", content.lstrip().partition(b"\n")[0])
    if isinstance(first_line, Record) or first_line.reason != "bad_json":
        return "; if each line is a row of its own, set file_type: jsonl"
    return "; write its values as one list, [ ... ] with commas between them, or each in a line of its own (.jsonl)"


def document_rows(document: Document, records: str | None, name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The rows that `records` names in a document, or the document as one row. A fault spoils only the row that holds it."""
    try:
        for where, value in records_in(document.value, records.split(".") if records else [], name):
            if fault := document.fault_in(value):
                yield faulty_row(where, value, fault, records)
            elif records and len(json.dumps(value)) > limits.row_bytes:
                yield Broken(where, "row_too_long", f"more than {limits.row_bytes:,} bytes")
            else:
                yield as_record(where, value)
    except RepeatedKey as error:
        yield Broken(f"{name}:1", "repeated_key", f"{error} in the mapping that holds the rows")


def faulty_row(where: str, value: Any, fault: Fault, records: str | None) -> Broken:
    """The broken row, with the place of its fault. Of a whole document a part may be named whose other rows are read."""
    place = f" in {fault.place}" if fault.place else ""
    detail = fault.detail + place if records is None or fault.reason != "not_utf8" else place.strip()
    outer = fault.place.partition("[")[0]
    if records is None and outer and "[" in fault.place:
        detail += f"; with records: {outer} only the row that holds it is dropped"
    return Broken(where, fault.reason, detail, repr(value)[:SNIPPET_BYTES])


def chain(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from blocks


def records_in(document: Any, keys: list[str], where: str) -> Iterator[tuple[str, Any]]:
    """(where, row) below the keys; `*` steps into every entry of a mapping, whose name becomes the row's `key`."""
    if keys and isinstance(document, Repeating):
        raise RepeatedKey(document.key)
    if keys and isinstance(document, dict):
        key, *rest = keys
        if key == "*":
            for entry, value in document.items():
                for place, row in records_in(value, rest, f"{where}:{entry}"):
                    # A mapping with a key twice stays what it is, and is told as that.
                    plain = isinstance(row, dict) and not isinstance(row, Repeating)
                    yield place, {"key": entry, **row} if plain else row
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
    """Cuts top-level JSON lists into their elements by counting brackets, without parsing them.

    One list may follow another, as where files were put one behind another. What else stands outside lists is cut too.
    """

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
        self.outside = True
        """Whether no list has begun, or the last one has ended."""
        self.misplaced = False
        """Whether what was last returned stands outside the lists."""

    def feed(self, block: bytes) -> Iterator[Line]:
        """The elements that end in this block, with the number of the line they start on."""
        position = 0
        while position < len(block):
            if self.escaped:
                stop, token, self.escaped = position, b"", False
            else:
                match = (IN_STRING if self.in_string else STRUCTURE).search(block, position)
                stop, token = (match.start(), match.group()) if match else (len(block) - 1, b"")
            part, position = block[position : stop + 1], stop + 1
            self.line += part.count(b"\n")
            if self.in_string:
                yield from self.within_string(part, token)
            elif self.outside:
                yield from self.outside_lists(part, token)
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
            self.depth = 0 if self.outside else 1

    def outside_lists(self, part: bytes, token: bytes) -> Iterator[Line]:
        if self.depth == 0 and token in (b"[", b","):
            self.add(part[:-1])
            if self.element.replace(UTF8_MARK, b"").strip():
                yield self.finish()
            if token == b"[":
                self.outside, self.depth = False, 1
            self.element, self.element_line = bytearray(), self.line
            return
        self.depth = max(0, self.depth + (token in (b"[", b"{")) - (token in (b"]", b"}")))
        self.in_string = token == b'"'
        if self.element or part.strip():
            self.add(part)
        else:
            self.element_line = self.line
        if self.depth == 0 and token in (b"]", b"}"):
            yield self.finish()

    def outside_string(self, part: bytes, token: bytes) -> Iterator[Line]:
        self.depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        self.in_string = token == b'"'
        if self.depth == 0 and token == b"]":
            self.add(part[:-1])
            if self.element.strip():
                yield self.finish()
            self.outside, self.element, self.element_line = True, bytearray(), self.line
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
        self.broke_off, self.misplaced = broke_off, self.outside
        element = Line(self.element_line, bytes(self.element), self.too_long)
        self.element, self.element_line, self.too_long = bytearray(), self.line, False
        return element


def read_json_list(blocks: Iterable[bytes], name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The elements of top-level lists, each parsed by itself, so that a broken one spoils no other."""
    scanner = ListScanner(limits)
    in_rest = False
    for block in blocks:
        for element in scanner.feed(block):
            if in_rest and element.content.strip()[:1] not in (b"{", b"["):
                continue  # the rest of an element that broke off within a string
            in_rest = scanner.broke_off
            if scanner.misplaced:
                yield misplaced_element(element, name)
            else:
                yield from read_element(element, name, limits)
    if scanner.outside and scanner.element.strip():
        yield misplaced_element(scanner.finish(), name)
    if not scanner.outside:
        if scanner.element.strip():
            element = scanner.finish()
            ending = element.content.rstrip().removesuffix(b"]")
            yield from read_element(Line(element.number, ending, element.too_long), name, limits)
        yield Broken(f"{name}:{scanner.line}", "damaged_file", "the list does not end")


def misplaced_element(element: Line, name: str) -> Broken:
    content = element.content.lstrip()
    line = element.number + element.content[: len(element.content) - len(content)].count(b"\n")
    detail = "stands outside the list: put it into the list, or each row in a line of its own (.jsonl)"
    return Broken(f"{name}:{line}", "bad_json", detail, snippet_of(content))


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
