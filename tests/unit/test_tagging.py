from __future__ import annotations

import itertools

import pytest
import torch

from stages.lib.encoding.tagging import Dictionary, Span, best_tags, random_tags, spans_of, tag_names, tag_spans, words
from stages.lib.formulas.metrics import Tally, span_metrics, tally
from stages.lib.text.offsets import overlapping, trim, whole_characters

TEXT = "Ada met Bob Lee in Rome"
OFFSETS = words(TEXT)
LABELS = ["person", "place"]
SPANS = [Span(0, 3, "person"), Span(8, 15, "person"), Span(19, 23, "place")]


def test_tags_are_numbered_label_by_label() -> None:
    assert tag_names(LABELS) == ["O", "B-person", "I-person", "B-place", "I-place"]


def test_spans_become_tags_and_come_back() -> None:
    tagged = tag_spans(TEXT, SPANS, OFFSETS, LABELS)
    assert tagged.tags == [1, 0, 1, 2, 0, 3]
    assert not tagged.counts
    assert spans_of(TEXT, tagged.tags, OFFSETS, LABELS) == SPANS


def test_neighbouring_spans_of_one_label_stay_apart() -> None:
    spans = [Span(0, 3, "person"), Span(4, 7, "person")]
    tagged = tag_spans(TEXT, spans, OFFSETS, LABELS)
    assert tagged.tags == [1, 1, 0, 0, 0, 0]
    assert spans_of(TEXT, tagged.tags, OFFSETS, LABELS) == spans


def test_tokens_that_carry_the_space_before_a_word_are_no_mismatch() -> None:
    offsets = [(0, 3), (3, 7), (7, 11), (11, 15), (15, 18), (18, 23)]
    tagged = tag_spans(TEXT, SPANS, offsets, LABELS)
    assert tagged.tags == [1, 0, 1, 2, 0, 3]
    assert not tagged.counts
    assert spans_of(TEXT, tagged.tags, offsets, LABELS) == SPANS


@pytest.mark.parametrize(
    ("span", "reason", "tags"),
    [
        (Span(1, 3, "person"), "widened", [1, 0, 0, 0, 0, 0]),
        (Span(8, 13, "person"), "widened", [0, 0, 1, 2, 0, 0]),
        (Span(3, 4, "person"), "without_tokens", [0] * 6),
        (Span(90, 95, "person"), "without_tokens", [0] * 6),
        (Span(0, 3, "colour"), "unknown_label", [0] * 6),
    ],
)
def test_a_span_that_tags_cannot_say_is_counted_with_its_reason(span: Span, reason: str, tags: list[int]) -> None:
    tagged = tag_spans(TEXT, [span], OFFSETS, LABELS)
    assert tagged.counts == {reason: 1}
    assert tagged.tags == tags


def test_of_two_spans_on_one_token_the_first_stays() -> None:
    tagged = tag_spans(TEXT, [Span(12, 15, "place"), Span(8, 15, "person")], OFFSETS, LABELS)
    assert tagged.tags == [0, 0, 1, 2, 0, 0]
    assert tagged.counts == {"overlapping": 1}


def test_all_bytes_of_a_character_stand_for_it() -> None:
    """A character of three bytes: the fast tokenizer says (1, 1), (1, 1), (1, 2). A lone word-start mark, too."""
    assert whole_characters([(0, 1), (1, 1), (1, 1), (1, 2)]) == [(0, 1), (1, 2), (1, 2), (1, 2)]
    assert whole_characters([(0, 0), (0, 4)]) == [(0, 4), (0, 4)]
    assert whole_characters([(0, 2), (2, 2), (3, 5)]) == [(0, 2), (2, 2), (3, 5)]


def test_overlapping_passes_over_tokens_without_width() -> None:
    offsets = [(0, 2), (2, 2), (2, 5), (5, 5), (6, 9)]
    assert overlapping(offsets, 2, 6) == (2, 2)
    assert overlapping(offsets, 1, 7) == (0, 4)
    assert overlapping(offsets, 5, 6) is None
    assert overlapping([], 0, 1) is None


def test_trim_moves_inwards_over_white_space() -> None:
    assert trim("a  bc d", 1, 6) == (3, 5)


def test_an_inside_tag_that_continues_nothing_begins_a_span() -> None:
    assert spans_of(TEXT, [2, 0, 1, 4, 0, 0], OFFSETS, LABELS) == [
        Span(0, 3, "person"),
        Span(8, 11, "person"),
        Span(12, 15, "place"),
    ]


def legal(path: tuple[int, ...]) -> bool:
    """I-x (even, not 0) must follow B-x (one less) or I-x."""
    return all(tag % 2 or not tag or before in (tag - 1, tag) for before, tag in zip((0, *path), path, strict=False))


def test_best_tags_is_the_best_of_all_legal_paths() -> None:
    """Compared with a search through all 5 ** n paths, for rows of 1 to 4 tokens in one padded batch."""
    generator = torch.Generator().manual_seed(3)
    log_probs_BTK = torch.randn(40, 4, 5, generator=generator).log_softmax(-1)
    lengths = [1 + row % 4 for row in range(40)]
    mask_BT = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    found = best_tags(log_probs_BTK, mask_BT).tolist()
    illegal_greedy = 0
    for log_probs_TK, length, path in zip(log_probs_BTK, lengths, found, strict=True):
        paths = [candidate for candidate in itertools.product(range(5), repeat=length) if legal(candidate)]
        scores = [sum(log_probs_TK[t, tag].item() for t, tag in enumerate(candidate)) for candidate in paths]
        assert tuple(path[:length]) == paths[scores.index(max(scores))]
        assert path[length:] == [0] * (4 - length)
        illegal_greedy += not legal(tuple(log_probs_TK[:length].argmax(-1).tolist()))
    assert illegal_greedy, "the comparison must hold rows where taking each token's best tag would be illegal"


def test_best_tags_of_texts_without_tokens() -> None:
    assert best_tags(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_span_f1_counts_exact_spans() -> None:
    """person: 1 right of 2 found, 2 wanted. place: 0 right of 1 found, 1 wanted (its end differs).
    Over all: precision 1 / 3, recall 1 / 3, F1 = 2 * 1 / (3 + 3) = 1 / 3."""
    found = [Span(0, 3, "person"), Span(4, 7, "person"), Span(19, 22, "place")]
    tallies = tally(found, SPANS)
    assert tallies == {"person": Tally(1, 2, 2), "place": Tally(0, 1, 1)}
    assert tallies["person"].f1 == 0.5
    assert span_metrics(tallies, "heldout_") == pytest.approx(
        {"heldout_f1": 1 / 3, "heldout_precision": 1 / 3, "heldout_recall": 1 / 3}
    )


def test_f1_without_spans_is_zero() -> None:
    assert span_metrics({}, "") == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_random_tags_follow_their_distribution_and_seed() -> None:
    tags = random_tags(10_000, [3, 0, 1], "7:0")
    assert tags == random_tags(10_000, [3, 0, 1], "7:0")
    assert tags != random_tags(10_000, [3, 0, 1], "7:1")
    assert set(tags) == {0, 2}
    assert tags.count(0) == pytest.approx(7500, abs=4 * (10_000 * 0.75 * 0.25) ** 0.5)


def test_dictionary_knows_the_most_frequent_meaning_of_a_word() -> None:
    """Rome: twice a place, once nothing. Lee: once each, so nothing. Ada: a person."""
    rows = [
        ("Ada saw Rome", [Span(0, 3, "person"), Span(8, 12, "place")]),
        ("Rome burns", [Span(0, 4, "place")]),
        ("Lee in Rome", [Span(0, 3, "person")]),
        ("Lee of it", []),
    ]
    assert Dictionary(rows).spans("Ada Ada left Rome, said Lee") == [Span(0, 7, "person"), Span(13, 17, "place")]


def test_words_of_chinese_are_its_characters() -> None:
    text = "\u5728 New-York 3\u6708"
    assert [text[start:end] for start, end in words(text)] == ["\u5728", "New", "-", "York", "3", "\u6708"]
