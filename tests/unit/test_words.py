"""Words of any script, and how much they say: what filters and near-duplicate search stand on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from stages.lib.curation.words import any_script_words, bare_letters, measure, words_in

RIGHTS = Path(__file__).resolve().parents[1] / "human_rights.jsonl.gz"


def articles() -> dict[str, list[str]]:
    """Language -> the preamble and articles of the Universal Declaration of Human Rights."""
    with gzip.open(RIGHTS, "rt", encoding="utf-8") as file:
        return {row["language"]: row["articles"] for row in map(json.loads, file)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's naïve_2, see?", ["It", "'", "s", "naïve_2", ",", "see", "?"]),
        # combining marks belong to the letters before them
        ("हिन्दी में लिखा।", ["हिन्दी", "में", "लिखा", "।"]),
        ("cafe\u0301 ❤\ufe0f!", ["cafe\u0301", "❤\ufe0f", "!"]),
        # no spaces between words
        ("今天天气很好。", ["今天", "天气", "很好", "。"]),
        ("これは日本語です。", ["これ", "は", "日本語", "です", "。"]),
        ("ภาษาไทยและภาษาลาว", ["ภาษา", "ไทย", "และ", "ภาษา", "ลาว"]),
        ("コンピューターを使う", ["コンピューター", "を", "使う"]),
        ("用Python写3行代码", ["用", "Python", "写", "3", "行", "代码"]),
        # what does not show is no word: a byte order mark, marks of direction, where a line may break
        ("\ufeffa\u200bb \u200fשלום\u200e", ["a", "b", "שלום"]),
        # what joins letters does not cut: Persian has its prefixes so
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        # marks that do what spaces do
        ("བོད་སྐད", ["བོད", "སྐད"]),
        ("ሰላም፡ለዓለም", ["ሰላም", "ለዓለም"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert any_script_words().word_tokenize(text) == expected


def test_no_letter_is_lost() -> None:
    """The words of a text are its letters, digits and marks in their order: nothing is left out, and nothing comes twice."""
    for language, texts in articles().items():
        for text in texts:
            found = "".join(any_script_words().word_tokenize(text))
            missing = set(text) - set(found) - set(" \n\u200b\u200c\u200e\u200f\u00ad\u0f0b\u0f0c\u1361\u3000\u00a0")
            assert (language, missing) == (language, set())
            assert len(found) == sum(text.count(each) for each in set(found))


def test_what_words_say() -> None:
    """An alphabet needs 5.5 letters, Chinese 1.5, Devanagari 3.1 (4 letters and 3 marks); a number is a word, a mark none."""
    found = words_in("Words, 123 मानवीय 权利")
    assert [(word.text, round(word.says, 3), word.is_mark) for word in found] == [
        ("Words", round(5 / 5.5, 3), False),
        (",", 0.0, True),
        ("123", 1.0, False),
        ("मानवीय", round(4 / 3.1, 3), False),
        ("权利", round(2 / 1.5, 3), False),
    ]
    assert [bare_letters(word) for word in ("มีี", "cafe\u0301", "a_b", "\u0301")] == ["ม", "cafe", "a_b", "\u0301"]


def test_the_same_content_says_the_same_in_every_language() -> None:
    """The Declaration is 1,687 words in English. As words, the others are 0.45 (Malayalam) to 1.77 (Tibetan) of that; as what
    words say, within a quarter of it."""
    counted = {
        language: [word for text in texts for word in words_in(text) if not word.is_mark]
        for language, texts in articles().items()
    }
    assert len(counted["en"]) == pytest.approx(1_687, abs=5)
    as_words = {language: len(words) / len(counted["en"]) for language, words in counted.items()}
    said = {language: sum(word.says for word in words) / len(counted["en"]) for language, words in counted.items()}
    assert min(as_words.values()) < 0.5 and max(as_words.values()) > 1.7
    assert {language: round(share, 2) for language, share in said.items() if not 0.75 <= share <= 1.25} == {}


def test_texts_are_measured_as_english_ones() -> None:
    """Four words of two Chinese characters, of 1.5 to an English word: 4 words say 8 / 1.5 = 5.3, so 5 words of a run are 5."""
    measured = measure("今天天气很好 ok 天气")
    assert measured.text == "今今今天天天 天天天气气气 很很很好好好 ok 天天天气气气"
    assert measured.scale == 1.0
    # Three words of 10 letters besides marks say as much as 10 / 4.9 = 2.04
    measured = measure("ภาษาไทยและ")
    assert measured.text == "ภาษา ไทย และ"
    assert measured.scale == pytest.approx(3 / (10 / 4.9))
    assert measure("nothing changes, here 1").text == "nothing changes, here 1"
    for no_word in ("", "...", "\u0e35", "។", "\u0301"):
        assert measure(no_word).scale == 1.0
        assert not any(word.says for word in words_in(no_word))
