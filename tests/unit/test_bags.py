"""The bag of words: numbers derived by hand, every script, and that it depends on no order."""

from __future__ import annotations

import math

import pytest

from stages.lib.encoding.bags import SMOOTHING, BagOfWords, bag, grams
from tests import rows


def labelled(*texts: str) -> list[dict]:
    return [{"text": text} for text in texts]


def test_scores_are_those_of_naive_bayes() -> None:
    """Three rows of two words and the pair of them each: six grams in all for label 0 (good film twice: counted once a row),
    three for label 1. V: good, film, "good film", bad, "bad film" = 5.

    "good bad": of its grams (good, bad, "good bad") the last was never seen, and counts for none. With a = SMOOTHING
    label 0: log(2/3) + log((2 + a) / (6 + 5a)) + log(a / (6 + 5a));
    label 1: log(1/3) + log(a / (3 + 5a)) + log((1 + a) / (3 + 5a)).
    """
    model = BagOfWords(labelled("good film", "Good  film good", "bad film"), [0, 0, 1])
    # "good film good" has the pair "film good" as well: 3 + 4 grams of label 0, and V = 6.
    a = SMOOTHING
    (scores,) = model.scores(labelled("good bad"))
    expected = [
        math.log(2 / 3) + math.log((2 + a) / (7 + 6 * a)) + math.log(a / (7 + 6 * a)),
        math.log(1 / 3) + math.log(a / (3 + 6 * a)) + math.log((1 + a) / (3 + 6 * a)),
    ]
    assert scores.tolist() == pytest.approx(expected)
    assert model.predict(labelled("good film", "bad")) == [0, 1]


def test_what_was_never_seen_leaves_the_most_frequent_label() -> None:
    model = BagOfWords(labelled("a", "b", "c"), [4, 7, 7])
    assert model.predict(labelled("zzz", "")) == [7, 7]
    assert BagOfWords(labelled("", ""), [3, 1]).predict(labelled("x")) == [1], "of equally likely ones the lowest"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Not bad!", {"not", "bad", "!", "not bad", "bad !"}),
        ("\u5f88\u597d", {"\u5f88", "\u597d", "\u5f88 \u597d"}),
        ("\u0e14\u0e35", {"\u0e14", "\u0e35", "\u0e14 \u0e35"}),
        ("\ub530\ub73b\ud55c", {"\ub530\ub73b\ud55c"}),
    ],
    ids=["English", "Chinese", "Thai", "Korean"],
)
def test_words_of_every_script(text: str, expected: set[str]) -> None:
    assert grams(text) == expected


def test_a_pair_is_more_than_both_texts_in_a_row() -> None:
    """Which side says a word, and whether the other says it too."""
    row = {"text": "a b", "text_pair": "a c"}
    assert {"1 b", "2 c", "= a", "! b", "! c", "1 a b"} <= bag(row)
    assert bag(row) != bag({"text": "a c", "text_pair": "a b"})
    # One of five grams is shared: 2 tenths.
    assert {each for each in bag(row) if each.startswith("shared")} == {"shared 0", "shared 1", "shared 2"}


def test_pairs_that_say_the_same_are_told_from_others() -> None:
    """By no word that training has seen: only by what both share."""

    def pairs(start: int) -> list[dict]:
        texts = [f"w{number} x{number} y{number} z{number}" for number in range(start, start + 60)]
        same = [{"text": text, "text_pair": text} for text in texts]
        return same + [{"text": one, "text_pair": two} for one, two in zip(texts, reversed(texts), strict=True)]

    model = BagOfWords(pairs(0), [1] * 60 + [0] * 60)
    assert model.predict(pairs(1000)) == [1] * 60 + [0] * 60


def test_it_depends_on_no_order_and_learns_intents() -> None:
    data = rows.requests(1500)
    labels = sorted({row["label"] for row in data})
    numbers = [labels.index(row["label"]) for row in data]
    model = BagOfWords(data[:1000], numbers[:1000])
    found = model.predict(data[1000:])
    assert BagOfWords(data[:1000][::-1], numbers[:1000][::-1]).predict(data[1000:]) == found
    right = sum(one == other for one, other in zip(found, numbers[1000:], strict=True))
    assert right > 0.9 * len(found)
