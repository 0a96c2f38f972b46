"""Texts that are too long for a model, cut into windows that overlap.

    <cls> question <sep> context tokens 0..n     <sep>
    <cls> question <sep> context tokens n-s..2n-s <sep>      s = stride: tokens that neighbours share

Single texts are cut the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import DataError, Problem
from stages.lib.text.frames import Frame


def cut_places(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First and last (excluded) token of each window over `length` tokens: `room` each, `stride` shared with the next.

    The last window ends with the text, and is the only one that may be shorter. An empty text has one empty window.
    """
    if stride >= room:
        raise DataError(
            Problem(
                "params.stride_tokens",
                f"{stride} tokens are shared between windows that have room for {room}",
                "Lower stride_tokens, or raise max_length_tokens.",
            )
        )
    starts = range(0, max(1, length - stride), room - stride)
    return [(start, min(start + room, length)) for start in starts]


@dataclass(frozen=True)
class TextWindow:
    """What the model sees at once. `ids[first : first + size]` are the tokens `start` to `start + size` of the text."""

    ids: list[int]
    type_ids: list[int]
    first: int
    start: int
    size: int


def windows_of(
    frame: Frame, text: Sequence[int], max_length: int, stride: int, question: Sequence[int] = ()
) -> list[TextWindow]:
    """The windows over the ids `text`, each after the ids `question` where there is one."""
    head = [*frame.before, *question, *frame.between]
    windows = []
    for start, end in cut_places(len(text), max_length - len(head) - len(frame.after), stride):
        part = text[start:end]
        sides = (question, part) if frame.between else (part, ())
        type_ids = frame.type_ids(len(sides[0]), len(sides[1]))
        windows.append(TextWindow(frame.around(*sides), type_ids, len(head), start, end - start))
    return windows


def owned(windows: Sequence[TextWindow]) -> list[tuple[int, int]]:
    """Per window, the first and last (excluded) token of the text that it decides on: where it sees most around them.

    The tokens that two neighbours share are divided in the middle, so that every token has one owner.
    """
    borders = [0]
    for left, right in itertools.pairwise(windows):
        borders.append((right.start + left.start + left.size + 1) // 2)
    borders.append(windows[-1].start + windows[-1].size)
    return list(itertools.pairwise(borders))


def evaluation_batch_size(batch_size: int, windows: Sequence[int]) -> int:
    """How many texts are measured at once, if texts have so many windows: at most four times `batch_size` windows.

    Without gradients a forward pass takes less than a quarter of the memory that training takes.
    """
    return max(1, 4 * batch_size // max(windows, default=1))
