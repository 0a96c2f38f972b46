"""Extractive question answering over sliding windows: cutting, labels, the best answers over all windows, EM and F1.

    <cls> question <sep> context tokens 0..n     <sep>
    <cls> question <sep> context tokens n-s..2n-s <sep>      s = stride: tokens that neighbours share

A window's first token stands for "no answer here": its position, 0, is the label of a window without the answer.
Single texts that are too long are cut the same way. Shapes: `T` tokens of a window.
"""

from __future__ import annotations

import itertools
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from stages.lib.encoders import Frame, encode
from stages.lib.tagging import Offset, overlapping, trim

CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNIT = re.compile(rf"[{CHARACTERS}]|[^\s{CHARACTERS}]+")
"""What F1 counts: a Chinese or Japanese character by itself, elsewhere a word between white space."""

ARTICLES = frozenset({"a", "an", "the"})


def cut(length: int, room: int, stride: int) -> list[tuple[int, int]]:
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
class Window:
    """What the model sees at once. `ids[first : first + size]` are the tokens `start` to `start + size` of the text."""

    ids: list[int]
    type_ids: list[int]
    first: int
    start: int
    size: int


def windows_of(
    frame: Frame, text: Sequence[int], max_length: int, stride: int, question: Sequence[int] = ()
) -> list[Window]:
    """The windows over the ids `text`, each after the ids `question` where there is one."""
    head = [*frame.before, *question, *frame.between]
    windows = []
    for start, end in cut(len(text), max_length - len(head) - len(frame.after), stride):
        body = [*text[start:end], *frame.after]
        type_ids = [0] * len(head) + [int(bool(frame.between))] * len(body)
        windows.append(Window(head + body, type_ids, len(head), start, end - start))
    return windows


def owned(windows: Sequence[Window]) -> list[tuple[int, int]]:
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


def window_label(window: Window, offsets: Sequence[Offset], start: int, end: int) -> tuple[int, int]:
    """The first and last position, among the window's ids, of the characters `start` to `end` of the text.

    (0, 0) where the window does not hold all of them.
    """
    found = overlapping(offsets, start, end)
    if found is None or found[0] < window.start or found[1] >= window.start + window.size:
        return 0, 0
    return found[0] - window.start + window.first, found[1] - window.start + window.first


@dataclass(frozen=True)
class Reference:
    """An answer that counts as right."""

    start: int
    text: str


@dataclass(frozen=True)
class Question:
    """A question with all windows over its context. `labels` has the first reference's position in each window."""

    context: str
    references: list[Reference]
    offsets: list[Offset]
    windows: list[Window]
    labels: list[tuple[int, int]]
    shortened: bool
    """Whether the question was longer than allowed, and lost its end."""

    @property
    def has_answer(self) -> list[bool]:
        """Whether each window holds the whole answer. No answer begins at a window's first position."""
        return [label != (0, 0) for label in self.labels]


def read_question(
    row: dict, tokenizer: PreTrainedTokenizerBase, frame: Frame, *, max_length: int, stride: int, max_question: int
) -> Question:
    """The row `{context, question, answers}` cut into windows of at most `max_length` tokens."""
    question, _ = encode(tokenizer, row["question"])
    context, offsets = encode(tokenizer, row["context"])
    windows = windows_of(frame, context, max_length, stride, question[:max_question])
    references = [Reference(answer["start"], answer["text"]) for answer in row["answers"]]
    labels = [(0, 0)] * len(windows)
    if references:
        start, end = trim(row["context"], references[0].start, references[0].start + len(references[0].text))
        labels = [window_label(window, offsets, start, end) for window in windows]
    return Question(row["context"], references, offsets, windows, labels, len(question) > max_question)


@dataclass(frozen=True)
class Answer:
    """Characters of the context, and the log-probability that the first of their tokens and the last are the answer's."""

    start: int
    end: int
    score: float


def best_answers(
    question: Question,
    start_log_probs: Sequence[torch.Tensor],
    end_log_probs: Sequence[torch.Tensor],
    n_best: int,
    max_tokens: int,
) -> tuple[list[Answer], float]:
    """The `n_best` answers over all windows of the question, best first, and the score of there being none.

    The log-probabilities are one vector of T per window: unlike logits, they can be compared between windows. An answer
    has at most `max_tokens`, all in one window, and scores log p(its first token) + log p(its last); found in several
    windows, it keeps its best score. The score of no answer is the lowest, over the windows, of the first position's:
    every window must agree that it is empty.
    """
    scores: dict[Offset, float] = {}
    nothing = float("inf")
    for window, start_T, end_T in zip(question.windows, start_log_probs, end_log_probs, strict=True):
        nothing = min(nothing, float(start_T[0] + end_T[0]))
        inside = slice(window.first, window.first + window.size)
        pairs_TT = start_T[inside, None].double() + end_T[None, inside].double()
        allowed_TT = torch.ones_like(pairs_TT, dtype=torch.bool).triu().tril(max_tokens - 1)
        pairs_TT = pairs_TT.masked_fill(~allowed_TT, float("-inf"))
        top = pairs_TT.flatten().topk(min(n_best, int(allowed_TT.sum())))
        for score, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            first, last = divmod(place, window.size)
            left, right = question.offsets[window.start + first][0], question.offsets[window.start + last][1]
            left, right = trim(question.context, left, right)
            if left < right:
                scores[left, right] = max(score, scores.get((left, right), float("-inf")))
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    return [Answer(start, end, score) for (start, end), score in ranked], nothing


def answer_text(question: Question, answers: Sequence[Answer], nothing: float, null_threshold: float | None) -> str:
    """The best answer's text; empty if there is none, or if its absence scores more than `null_threshold` higher."""
    if not answers or (null_threshold is not None and nothing - answers[0].score > null_threshold):
        return ""
    return question.context[answers[0].start : answers[0].end]


def units(text: str) -> list[str]:
    """The words of an answer (in Chinese and Japanese, characters), without case, punctuation and English articles.

    An answer that is nothing but punctuation or articles counts as it stands.
    """
    # Taken out, not replaced by a space: "don't" is one word, as in SQuAD's own script.
    plain = "".join(character for character in text.lower() if not is_punctuation(character))
    return [unit for unit in UNIT.findall(plain) if unit not in ARTICLES] or text.lower().split()


def is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer has the same units as one of the references, in order, else 0. Rajpurkar et al. 2016."""
    return float(any(units(answer) == units(reference) for reference in references or [""]))


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """`2 common / (given + wanted)` in units of answer and reference, the best reference's. Rajpurkar et al. 2016."""
    return max(f1_of_units(units(answer), units(reference)) for reference in references or [""])


def f1_of_units(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def span_of_units(context: str, first: int, count: int) -> str:
    """The part of the context from unit number `first` to `count` units on."""
    found = list(UNIT.finditer(context))[first : first + count]
    return context[found[0].start() : found[-1].end()] if found else ""


def random_answer(context: str, count: int, seed: str) -> str:
    """`count` units of the context, from anywhere: what chance finds."""
    places = max(1, len(UNIT.findall(context)) - count + 1)
    return span_of_units(context, random.Random(seed).randrange(places), count)


def mean_units(texts: Iterable[str]) -> int:
    """The mean number of units of the texts, rounded, and at least 1."""
    counts = [len(UNIT.findall(text)) for text in texts]
    return max(1, round(sum(counts) / len(counts))) if counts else 1
