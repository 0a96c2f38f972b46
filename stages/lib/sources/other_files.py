"""Files that no reader reads, told by how they begin, and what to do with them."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import DataError, Problem
from stages.lib.sources.params import compression_of

PACKED = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
"""How compressed files begin -> the suffix by which they are decompressed."""


OTHERS = (
    (rb"PK\x03\x04", "is a zip archive, as workbooks of spreadsheets are", "Save its table as CSV, and name that."),
    (
        rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
        "is compressed with bzip2, which is not read",
        "Decompress it, or pack it as .gz or .zst.",
    ),
    (rb"\xfd7zXZ\x00", "is compressed with xz, which is not read", "Decompress it, or pack it as .gz or .zst."),
    (rb"SQLite format 3\x00", "is a database", "Export its table as CSV or JSON lines, and name that."),
    (rb"%PDF-\d", "is a PDF, which holds pages and no rows", "Extract its text, and name that."),
)
"""(how it begins, what it is, what to do) of files that are no text."""


START_BYTES = 16


def unread_content(path: Path, start: bytes) -> Problem | None:
    """What is wrong with a file that begins so; None where nothing is."""
    for mark, suffix in PACKED.items():
        if start.startswith(mark) and compression_of(path) != suffix:
            hint = f"Rename it to {path.name.removesuffix(compression_of(path))}{suffix}."
            return Problem(str(path), f"is compressed, and its name does not end with {suffix}", hint)
    for pattern, what, hint in OTHERS:
        if re.match(pattern, start):
            return Problem(str(path), what, hint)
    return None


def refuse_unread_content(path: Path, file_type: str) -> None:
    """Raises `DataError` for a file whose content no reader reads, or another one than that of the file type. Raises `OSError`."""
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    if problem := unread_content(path, start):
        raise DataError(problem)
    if start.startswith(b"PAR1") and file_type != "parquet":
        raise DataError(Problem(str(path), f"is a Parquet file, and is read as {file_type}", "Set file_type: parquet."))
