"""What counting words reaches: the baseline that a classifier of texts has to beat.

Multinomial naive Bayes over the words and pairs of neighbouring words that a text has, each counted once per text (Wang and
Manning 2012, Baselines and Bigrams). Quick, the same in every run, and on short texts hard to beat.

    score(label) = log p(label) + sum over the text's grams of log((count(gram, label) + a) / (count(label) + a V))
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from stages.lib.rows.canonical import Row

BY_CHARACTER = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words."""


TERM = re.compile(rf"[{BY_CHARACTER}]|[^\W_{BY_CHARACTER}]+|[^\s]")
"""A run of letters and digits, or one character that is not white space."""


SMOOTHING = 0.1
"""a: what is added to each count, so that what was never seen with a label does not rule it out. With the usual 1, pairs of
words are so many that they drown what was seen: on data sets of many intents that costs 3 to 7 points."""


ROWS_AT_ONCE = 10_000


def grams(text: str) -> set[str]:
    """The words of a text, and the pairs of neighbours among them."""
    terms = TERM.findall(text.lower())
    return {*terms, *(f"{one} {other}" for one, other in itertools.pairwise(terms))}


def bag(row: Row) -> set[str]:
    """The grams of a text; of a pair those of each side, those that both share or only one has, and how many they share."""
    first = grams(row["text"])
    if "text_pair" not in row:
        return first
    second = grams(row["text_pair"])
    tenths = 10 * len(first & second) // max(1, len(first | second))
    return {
        *(f"1 {each}" for each in first),
        *(f"2 {each}" for each in second),
        *(f"= {each}" for each in first & second),
        *(f"! {each}" for each in first ^ second),
        *(f"shared {at_least}" for at_least in range(tenths + 1)),
    }


def hashes(row: Row) -> NDArray[np.int64]:
    """The grams of a row as numbers of 32 bits, ascending. Two grams share one by chance once in four billion pairs."""
    return np.unique(np.fromiter((zlib.crc32(each.encode()) for each in bag(row)), dtype=np.int64))


class BagOfWords:
    """Learned from rows and the numbers of their labels."""

    def __init__(self, rows: Sequence[Row], labels: Sequence[int]) -> None:
        self.labels: NDArray[np.int64] = np.unique(np.asarray(labels, dtype=np.int64))
        """The numbers that it may find: those of training."""
        places_N = np.searchsorted(self.labels, np.asarray(labels, dtype=np.int64))
        self.width = len(self.labels)
        self.keys: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """gram x width + label, ascending, for all that occur together."""
        self.counts: NDArray[np.float64] = np.empty(0)
        """In how many rows they do."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self.add(rows[start : start + ROWS_AT_ONCE], places_N[start : start + ROWS_AT_ONCE])
        self.grams = np.unique(self.keys // self.width)
        totals_L = np.bincount(self.keys % self.width, weights=self.counts, minlength=self.width)
        self.log_prior_L = np.log(np.bincount(places_N, minlength=self.width) / len(rows))
        self.log_total_L = np.log(totals_L + SMOOTHING * max(1, len(self.grams)))

    def add(self, rows: Sequence[Row], places_N: NDArray[np.int64]) -> None:
        """Counts the grams of some rows."""
        fresh = [hashes(row) * self.width + place for row, place in zip(rows, places_N.tolist(), strict=True)]
        keys = np.concatenate([self.keys, *fresh])
        counts = np.concatenate([self.counts, np.ones(len(keys) - len(self.keys))])
        self.keys, inverse = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(inverse, weights=counts, minlength=len(self.keys))

    def predict(self, rows: Iterable[Row]) -> list[int]:
        """The number of the likeliest label of each row; of equally likely ones the lowest."""
        return [int(self.labels[scores_L.argmax()]) for scores_L in self.scores(rows)]

    def scores(self, rows: Iterable[Row]) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities of each row's labels, up to a constant. Grams that training never saw count for none."""
        for row in rows:
            known_G = np.intersect1d(hashes(row), self.grams, assume_unique=True)
            keys_GL = known_G[:, None] * self.width + np.arange(self.width)
            places_GL = np.searchsorted(self.keys, keys_GL).clip(max=max(0, len(self.keys) - 1))
            counts_GL = np.where(self.keys[places_GL] == keys_GL, self.counts[places_GL], 0.0) if len(known_G) else 0.0
            logs_GL = np.log(counts_GL + SMOOTHING) if len(known_G) else np.zeros((0, self.width))
            yield self.log_prior_L + logs_GL.sum(axis=0) - len(known_G) * self.log_total_L
