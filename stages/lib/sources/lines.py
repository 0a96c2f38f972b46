"""Files as blocks and lines of bytes, decompressed and bounded, and what readers make of them: records, or broken ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stages.lib.sources.conversion import REASONS

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


UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One raw row, and where it stands: `train.jsonl:3`."""

    where: str
    row: dict[str, Any]
    noticed: tuple[str, ...] = ()
    """What the user should know of how it was read, in words."""


@dataclass(frozen=True)
class Broken:
    """One record that cannot be read: `reason` is one of `conversion.REASONS`."""

    where: str
    reason: str
    detail: str
    snippet: str = ""

    def __post_init__(self) -> None:
        assert self.reason in REASONS, self.reason


@dataclass(frozen=True)
class Limits:
    """`row_bytes`: the longest record that is parsed."""

    row_bytes: int


class Damaged(Exception):
    """The file ends early, or its compressed content is corrupt: nothing more can be read from it."""


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
    for block in with_line_feeds(blocks):
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


def with_line_feeds(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks; of a file whose lines end with a carriage return alone, as on old Macs, with line feeds in their place.

    The first line end decides, which must be among the first `BLOCK_BYTES`: a longer line is no line of such a file.
    """
    blocks = iter(blocks)
    head, damage = b"", None
    try:
        for block in blocks:
            head += block
            if b"\n" in block or len(head) >= BLOCK_BYTES:
                break
    except Damaged as error:
        damage = error  # What stands before it is read all the same.
    bare = has_bare_returns(head)
    yield head.replace(b"\r", b"\n") if bare else head
    if damage:
        raise damage
    for block in blocks:
        yield block.replace(b"\r", b"\n") if bare else block


def has_bare_returns(head: bytes) -> bool:
    """Whether lines end with a carriage return alone in the beginning of a file."""
    return b"\n" not in head and b"\r" in head[:-1]


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
