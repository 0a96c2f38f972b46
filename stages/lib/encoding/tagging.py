"""BIO tags and spans: from character spans to tags of tokens, and back by the best legal path.

Tags are numbered O = 0, then B-x = 1 + 2k and I-x = 2 + 2k for the label x number k. Shapes: `B` sequences, `T` tokens,
`K` tags.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from stages.lib.text.offsets import Offset, overlapping, trim

OUTSIDE = 0


FORBIDDEN = -1e9
"""Log-probability of a forbidden transition. Finite, so that a sequence without tokens stays free of NaN."""


WORD = re.compile(r"[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\s]")
"""A run of letters and digits, or any other single character that is not white space: Chinese goes by the character."""


@dataclass(frozen=True, order=True)
class Span:
    """The characters `start` to `end` (excluded) of a text, and what they are."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Tagged:
    """Tag per token, and how many spans could not be said in tags as they stand, by reason."""

    tags: list[int]
    counts: Counter[str]


def tag_names(labels: Sequence[str]) -> list[str]:
    """The name of every tag, in the order of their numbers: O, B-x, I-x, B-y, I-y, ..."""
    return ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]


def tag_spans(text: str, spans: Iterable[Span], offsets: Sequence[Offset], labels: Sequence[str]) -> Tagged:
    """The BIO tag of each token: every token that shares a character with a span belongs to it.

    Counted, by reason: `widened` (the span begins or ends within a token, and grows to the whole of it), `overlapping`
    (a token of it belongs to an earlier span; dropped), `without_tokens` (white space, or beyond the text; dropped),
    `unknown_label` (its label is not among `labels`; dropped).
    """
    numbers = {label: number for number, label in enumerate(labels)}
    tags = [OUTSIDE] * len(offsets)
    counts: Counter[str] = Counter()
    for span in sorted(spans):
        if span.label not in numbers:
            counts["unknown_label"] += 1
            continue
        found = overlapping(offsets, *trim(text, span.start, span.end))
        if found is None:
            counts["without_tokens"] += 1
            continue
        first, last = found
        if any(tags[first : last + 1]):
            counts["overlapping"] += 1
            continue
        if trim(text, offsets[first][0], offsets[last][1]) != trim(text, span.start, span.end):
            counts["widened"] += 1
        begin = 1 + 2 * numbers[span.label]
        tags[first : last + 1] = [begin] + [begin + 1] * (last - first)
    return Tagged(tags, counts)


def spans_of(text: str, tags: Sequence[int], offsets: Sequence[Offset], labels: Sequence[str]) -> list[Span]:
    """The spans that the tags spell, without white space at their ends. An I that continues nothing begins a span."""
    spans: list[Span] = []
    start = end = 0
    current: int | None = None

    def close() -> None:
        if current is not None:
            left, right = trim(text, start, end)
            if left < right:
                spans.append(Span(left, right, labels[current]))

    for tag, (left, right) in zip(tags, offsets, strict=True):
        label = None if tag == OUTSIDE else (tag - 1) // 2
        continues = label is not None and label == current and tag % 2 == 0
        if not continues:
            close()
            current, start = label, left
        end = right
    close()
    return spans


def best_tags(log_probs_BTK: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The most probable legal tags, shape BT: I-x comes only after B-x or I-x. Viterbi over the tokens of `mask_BT`.

    The mask is a run of True per row, from its first token on; what follows is O.
    """
    B, T, K = log_probs_BTK.shape
    if T == 0:
        return torch.zeros(B, 0, dtype=torch.long, device=log_probs_BTK.device)
    begins, insides = torch.arange(1, K, 2), torch.arange(2, K, 2)
    score_BK = log_probs_BTK[:, 0].float().clone()
    score_BK[:, insides] = FORBIDDEN
    steps_BK = []
    for t in range(1, T):
        # O and B-x may follow anything; I-x only its own B-x or I-x.
        best_B, origin_B = score_BK.max(dim=1)
        arrival_BK = best_B[:, None].expand(B, K).clone()
        origin_BK = origin_B[:, None].expand(B, K).clone()
        own = score_BK[:, begins] >= score_BK[:, insides]
        arrival_BK[:, insides] = torch.where(own, score_BK[:, begins], score_BK[:, insides])
        origin_BK[:, insides] = torch.where(own, begins.to(own.device), insides.to(own.device))
        # Beyond a row's end nothing changes, and each tag's origin is itself.
        alive_B1 = mask_BT[:, t, None]
        score_BK = torch.where(alive_B1, arrival_BK + log_probs_BTK[:, t].float(), score_BK)
        steps_BK.append(torch.where(alive_B1, origin_BK, torch.arange(K, device=origin_BK.device)))
    tag_B = score_BK.argmax(dim=1)
    path = [tag_B]
    for origin_BK in reversed(steps_BK):
        tag_B = origin_BK.gather(1, tag_B[:, None]).squeeze(1)
        path.append(tag_B)
    return torch.stack(path[::-1], dim=1).masked_fill(~mask_BT, OUTSIDE)


def random_tags(length: int, distribution: Sequence[float], seed: str) -> list[int]:
    """`length` tags drawn one by one with the weights of `distribution`: what chance finds."""
    return random.Random(seed).choices(range(len(distribution)), weights=distribution, k=length) if length else []


def words(text: str) -> list[Offset]:
    """Where the words of the text stand."""
    return [match.span() for match in WORD.finditer(text)]


class Dictionary:
    """Extraction by looking words up: each word of the training texts means what it most often meant there."""

    def __init__(self, rows: Iterable[tuple[str, Sequence[Span]]]) -> None:
        counts: dict[str, Counter[str]] = {}
        for text, spans in rows:
            offsets = words(text)
            labels = sorted({span.label for span in spans})
            for tag, (start, end) in zip(tag_spans(text, spans, offsets, labels).tags, offsets, strict=True):
                label = "" if tag == OUTSIDE else labels[(tag - 1) // 2]
                counts.setdefault(text[start:end], Counter())[label] += 1
        # Ties go to the label that sorts first, and "" (no entity) before all: the same whatever the order of rows.
        self.label_of = {word: min(count, key=lambda label: (-count[label], label)) for word, count in counts.items()}

    def spans(self, text: str) -> list[Span]:
        """Neighbouring words of one label make one span."""
        labels = sorted({label for label in self.label_of.values() if label})
        numbers = {label: number for number, label in enumerate(labels)}
        offsets = words(text)
        tags: list[int] = []
        previous = ""
        for start, end in offsets:
            label = self.label_of.get(text[start:end], "")
            tags.append(OUTSIDE if not label else 1 + 2 * numbers[label] + (label == previous))
            previous = label
        return spans_of(text, tags, offsets, labels)
