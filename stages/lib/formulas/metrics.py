"""Shares of what was found and wanted: precision, recall and F1 of spans and labels, exact match and F1 of answers."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Labelled(Hashable, Protocol):
    """Something found at a place, such as a span: equal to another if place and label are."""

    label: str


@dataclass(frozen=True)
class Tally:
    """Spans that were found as they should be, spans that were found, spans that should be."""

    right: float = 0
    found: float = 0
    wanted: float = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.right + other.right, self.found + other.found, self.wanted + other.wanted)

    @property
    def precision(self) -> float:
        """The share of found spans that are right; 0 where none was found."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """The share of wanted spans that were found; 0 where none was wanted."""
        return self.right / self.wanted if self.wanted else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, `2 right / (found + wanted)`; 0 where there is neither."""
        return 2 * self.right / (self.found + self.wanted) if self.found + self.wanted else 0.0


def tally(found: Iterable[Labelled], wanted: Iterable[Labelled]) -> dict[str, Tally]:
    """Label -> how the found spans meet the wanted ones: start, end and label must all be the same."""
    found, wanted = set(found), set(wanted)
    labels = sorted({span.label for span in found | wanted})
    return {
        label: Tally(
            sum(span.label == label for span in found & wanted),
            sum(span.label == label for span in found),
            sum(span.label == label for span in wanted),
        )
        for label in labels
    }


def span_metrics(tallies: Mapping[str, Tally], prefix: str, suffix: str = "") -> dict[str, float]:
    """`{prefix}f1{suffix}`, precision and recall over all labels (micro average)."""
    total = sum(tallies.values(), Tally())
    values = {"f1": total.f1, "precision": total.precision, "recall": total.recall}
    return {f"{prefix}{name}{suffix}": value for name, value in values.items()}


CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


UNIT = re.compile(rf"[{CHARACTERS}]|[^\s{CHARACTERS}]+")
"""What F1 counts: a Chinese or Japanese character by itself, elsewhere a word between white space."""


ARTICLES = frozenset({"a", "an", "the"})


def units(text: str) -> list[str]:
    """The words of an answer (in Chinese and Japanese, characters), without case, punctuation and English articles.

    An answer that is nothing but punctuation or articles counts as it stands.
    """
    # Taken out, not replaced by a space: "don't" is one word, as in SQuAD's own script.
    plain = "".join(character for character in text.lower() if not is_punctuation(character))
    return [unit for unit in UNIT.findall(plain) if unit not in ARTICLES] or text.lower().split()


def is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def answer_exact_match(answer: str, references: Sequence[str]) -> float:
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
