"""Numbers, sizes, durations, tables and lines of text as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO
from unicodedata import category

LONGEST_LINE_CHARACTERS = 2000
"""What a recipe or a journal holds may be megabytes long, and a line repeats it."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """The rows as aligned columns of text, header first."""
    everything = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def real(value: Any) -> float | None:
    """The value if it is one finite number, and not too large to be calculated with; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def number(value: Any) -> str:
    """A number as people read it: thousands with commas, small ones with four digits. `?` for what is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, int) and real(value) is None:
        return "?" if isinstance(value, bool) else f"{'-' if value < 0 else ''}1e+{math.log10(abs(value)):.0f}"
    if real(value) is None:
        return "?"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def seconds(value: float) -> str:
    """A duration: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if real(value) is None:
        return f"{number(value)} s"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def size(value: float) -> str:
    """Bytes in units of 1000."""
    if real(value) is None:
        return f"{number(value)} B"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def headline(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The named metrics, as far as there are, in one line; the first few where none is named.

    A name that ends in a dot stands for all that begin with it: `heldout_perplexity.` for one number per model.
    """
    chosen = [
        metric
        for name in names
        for metric in metrics
        if metric == name or (name[-1] == "." and metric.startswith(name))
    ] or list(metrics)[:4]
    return ", ".join(f"{name.removeprefix('heldout_')} {number(metrics[name])}" for name in chosen)


def printable(text: str, stream: TextIO) -> str:
    """The text as the stream can write it: cut in the middle where it is very long, with escapes for what would command a
    terminal or what the encoding lacks.
    """
    if len(text) > LONGEST_LINE_CHARACTERS:
        half = LONGEST_LINE_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escaped(text, spared="\n\t").encode(encoding, "backslashreplace").decode(encoding)


def escaped(text: str, *, spared: str = "") -> str:
    """The text with escapes for what would command a terminal, and for what ends a line, but for the characters in `spared`."""
    if text.isprintable():
        return text
    return "".join(ascii(each)[1:-1] if commands(each) and each not in spared else each for each in text)


def commands(character: str) -> bool:
    """Whether it is a control or format character, the half of a pair, or the end of a line or paragraph."""
    kind = category(character)
    return kind[0] == "C" or kind in ("Zl", "Zp")
