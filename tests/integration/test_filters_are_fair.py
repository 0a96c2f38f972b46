"""Filters judge the same content alike in every language: parallel texts, at default bounds and at stricter ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.lib.curation.filters import Filters, Judge, build_judge
from stages.lib.curation.words import words_in
from tests.unit.running_stages import params_of
from tests.unit.test_words import articles

FAIR = 1.5
"""How many times as many texts a language may lose as English does."""


def judge_of(folder: Path, **filters: Any) -> Judge:
    return build_judge(params_of(Filters, filters, folder))


def figures(judge: Judge, texts: dict[str, list[str]], title: str) -> dict[str, int]:
    """Language -> how many of its texts are dropped; printed with the reasons (`pytest -s` or `-rP` shows them)."""
    dropped = {language: Counter(filter(None, map(judge, each))) for language, each in texts.items()}
    print(title)
    for language, reasons in dropped.items():
        print(f"  {language}: {reasons.total()} of {len(texts[language])} {dict(reasons.most_common())}")
    return {language: reasons.total() for language, reasons in dropped.items()}


@pytest.mark.parametrize(
    "filters", [{"repetition": {}}, {"quality": {}}, {"repetition": {}, "quality": {}}], ids="+".join
)
def test_xquad(filters: dict[str, Any], shared_data: Path, tmp_path: Path) -> None:
    """240 paragraphs of Wikipedia, in English and as translators put them into the languages that are there."""
    texts = {
        path.stem.removeprefix("xquad_"): [
            paragraph["context"]
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
        ]
        for path in sorted((shared_data / "encoder").glob("xquad_*.json"))
    }
    assert {"en", "zh"} <= texts.keys()
    dropped = figures(judge_of(tmp_path, **filters), texts, f"XQuAD, {filters}")
    assert {language: count for language, count in dropped.items() if count > FAIR * dropped["en"]} == {}


def paragraphs() -> dict[str, list[str]]:
    """Language -> runs of two and of four articles of the Declaration, 50 words and more in English."""
    return {
        language: ["\n".join(texts[start : start + size]) for size in (2, 4) for start in range(len(texts) - size + 1)]
        for language, texts in articles().items()
    }


STRICTER = 0.7


def test_repetition(tmp_path: Path) -> None:
    """At bounds of 0.7 times the defaults nine of the 58 English texts are too repetitive: each article says "everyone has
    the right to". At the defaults none is, and of no other language more than one."""
    bounds = {
        "max_top_ngram_fractions": [round(STRICTER * most, 3) for most in (0.20, 0.18, 0.16)],
        "max_duplicate_ngram_fractions": [round(STRICTER * most, 3) for most in (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)],
    }
    strict = figures(judge_of(tmp_path, repetition=bounds), paragraphs(), f"Declaration, repetition times {STRICTER}")
    assert strict["en"] >= 5
    assert {language: count for language, count in strict.items() if count > FAIR * strict["en"]} == {}
    usual = figures(judge_of(tmp_path, repetition={}), paragraphs(), "Declaration, repetition")
    assert usual["en"] == 0
    assert {language: count for language, count in usual.items() if count > 1} == {}


def test_quality(tmp_path: Path) -> None:
    """The English texts that go are too short; in other languages about as many are."""
    dropped = figures(judge_of(tmp_path, quality={}), paragraphs(), "Declaration, quality")
    assert dropped["en"] >= 3
    assert {language: count for language, count in dropped.items() if count > FAIR * dropped["en"]} == {}
    assert set(dropped) == set(articles())


@pytest.mark.parametrize("language", articles())
def test_repetition_is_found_in_every_language(language: str, tmp_path: Path) -> None:
    """An article said six times among others, and one said without end, go in every language; in Tibetan, marks end no line."""
    texts = articles()[language]
    judge = judge_of(tmp_path, repetition={})
    sentence = max(texts[5:12], key=len).split("\n")[0]
    assert judge(" ".join([*texts[13:16], *[sentence] * 6]))
    assert judge(sentence * 20)
    assert judge("\n".join(texts[13:17])) is None


@pytest.mark.parametrize("language", articles())
def test_no_prose_is_found_in_every_language(language: str, tmp_path: Path) -> None:
    judge = judge_of(tmp_path, quality={})
    prose = "\n".join(articles()[language][20:26])
    assert judge(prose) is None
    assert judge(prose[:40]) == "quality_short_doc"
    words = [word.text for word in words_in(prose) if not word.is_mark][:100]
    table = "\n".join(f"{word} | {index} | {index * 7} ;" for index, word in enumerate(words))
    assert judge(table) == "quality_below_alpha_threshold"


@pytest.mark.parametrize(
    ("theirs", "english", "filters"), [("zh", "en_of_zh", {"repetition": {}}), ("th", "en_of_th", {"quality": {}})]
)
def test_translations_of_what_is_kept_are_kept(
    theirs: str, english: str, filters: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data.parent / "cases" / "data" / "02_repetition_and_quality_in_scripts_without_spaces"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}: it lies beside the checkout where the project is developed")
    judge = judge_of(tmp_path, **filters)
    for name in (english, theirs):
        texts = [
            json.loads(line)["text"]
            for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
        assert len(texts) >= 3
        assert [judge(text) for text in texts] == [None] * len(texts)
