"""Whether spans begin and end where words do: offsets that were counted otherwise look well in every other way."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

from stages.lib.rows.scripts import JOINED, UNSPACED
from stages.lib.sources.places import characters_before

READINGS = ("inclusive", "utf16", "utf8")
"""How offsets may count that are no half-open characters: the values of `span_offsets`."""

ATTACHED = r"\p{Hangul}\p{Arabic}\p{Hebrew}"
"""Scripts in which particles and articles are written onto a name, so that a span rightly ends inside a word."""


@lru_cache(maxsize=1)
def inside_word() -> Any:
    """Where two letters or digits meet, both of a script with spaces between words, or a mark follows."""
    import regex

    letter = rf"[\p{{L}}\p{{N}}_{JOINED}--[{UNSPACED}{ATTACHED}]]"
    return regex.compile(f"{letter}(?={letter})", regex.V1)


def ends_oddly(text: str, start: int, end: int) -> bool:
    """Whether the span [start, end) begins or ends inside a word or with a space."""
    if text[start].isspace() or text[end - 1].isspace():
        return True
    return any(0 < place < len(text) and inside_word().match(text, place - 1) for place in (start, end))


def span_read_as(text: str, start: int, end: int, reading: str | None) -> tuple[int, int] | None:
    """The span in half-open characters; None where the text has no such span. `reading`: one of `READINGS`, or None."""
    if reading in (None, "inclusive"):
        end = end + (reading == "inclusive")
        return (start, end) if 0 <= start < end <= len(text) else None
    first, last = (characters_before(text, offset, reading) for offset in (start, end))
    return (first, last) if first is not None and last is not None and first < last else None


def look_at_ends(text: str, start: int, end: int, taken: tuple[int, int], counts: Counter[str]) -> str | None:
    """Counts the span as `spans`, as `odd` if it ends oddly as it is `taken`, and under each reading of `start` and `end`
    by which it would not. Returns how an odd one looks."""
    counts["spans"] += 1
    for reading in READINGS:
        read = span_read_as(text, start, end, reading)
        counts[reading] += read is not None and not ends_oddly(text, *read)
    if not ends_oddly(text, *taken):
        return None
    counts["odd"] += 1
    before, after = text[max(0, taken[0] - 15) : taken[0]], text[taken[1] : taken[1] + 15]
    return f"{before}[{text[taken[0] : taken[1]]}]{after}"


def odd_ends(counts: Counter[str]) -> str:
    """What there is to be known of spans that end oddly, and which option would read more of them well."""
    told = f"{counts['odd']:,} of {counts['spans']:,} spans begin or end inside a word or with a space"
    best = max(READINGS, key=lambda reading: counts[reading])
    if counts[best] <= counts["spans"] - counts["odd"]:
        return f"{told}: look whether their offsets are right"
    return f"{told}; with span_offsets: {best} it would be {counts['spans'] - counts[best]:,}"
