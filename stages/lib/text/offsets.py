"""Characters and the tokens that stand for them. A span is half-open in characters; so is a token's offset."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Offset = tuple[int, int]


def whole_characters(offsets: Sequence[Offset]) -> list[Offset]:
    """The offsets, where the tokens of one character split into bytes all stand for it (fast tokenizers give its
    characters to the last byte, and none to the others), and a lone word-start mark for the token after it."""
    whole = list(offsets)
    for index in range(len(whole) - 2, -1, -1):
        start, end = whole[index]
        if start == end and whole[index + 1][0] == start:
            whole[index] = whole[index + 1]
    return whole


def overlapping(offsets: Sequence[Offset], start: int, end: int) -> tuple[int, int] | None:
    """The first and last token that share a character with `start` to `end`, or None.

    Offsets ascend. Tokens of width zero share nothing; the tokens of one character that was split into bytes all do.
    """
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    last = bisect_left(offsets, end, key=lambda offset: offset[0]) - 1
    while first <= last and offsets[first][0] == offsets[first][1]:
        first += 1
    while first <= last and offsets[last][0] == offsets[last][1]:
        last -= 1
    return (first, last) if first <= last else None


def trim(text: str, start: int, end: int) -> Offset:
    """`start` and `end` moved inwards over white space: a token may carry the space before its word."""
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
