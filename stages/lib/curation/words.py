"""The words of a text in any script, or in several, and how much they say: what filters count and duplicates are found by.

Where words stand between spaces, a run of letters, digits and their marks is a word. Chinese, Japanese, Thai, Lao, Khmer and
Burmese put no spaces between words: there ICU finds them, with the dictionaries by which browsers select and break lines
(Unicode Standard Annex 29, section 4).

Words are not of one size: of the same content, Malayalam makes half as many as English, and Burmese half as many again.
Letters are more even: languages that share a script need about as many. So where a bound is meant for English words, a word
says as much as its letters do. `LETTERS_PER_ENGLISH_WORD` was measured on the Universal Declaration of Human Rights, which is
1,687 words in English, and for Chinese and Thai on XQuAD as well, where foreign names, of which ICU knows few, take 15% more
letters: the figures of scripts without spaces allow for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stages.lib.rows.scripts import JOINED, UNSPACED

if TYPE_CHECKING:
    from datatrove.utils.word_tokenizers import WordTokenizer

BETWEEN = r"\u0f0b\u0f0c\u1361\U00010100\U00010101\U0001039f"
"""Marks that do what spaces do elsewhere: Tibetan between syllables, Ethiopic and old scripts between words."""

WORD_PATTERN = (
    rf"[{UNSPACED}][{UNSPACED}{JOINED}]*"
    rf"|[\p{{L}}\p{{N}}_{JOINED}--[{UNSPACED}]]+"
    rf"|[^\p{{L}}\p{{N}}_{JOINED}\p{{Cf}}\s{BETWEEN}][{JOINED}]*"
)
"""Runs without spaces, which are cut further; runs of letters and digits; single marks. What does not show is none of them."""

LETTERS_PER_ENGLISH_WORD: tuple[tuple[str, float], ...] = (
    (r"[\p{Hiragana}\p{Katakana}]", 2.4),
    (r"\p{Han}", 1.5),
    (r"\p{Thai}", 4.9),
    (r"\p{Lao}", 4.8),
    (r"[\p{Khmer}\p{Myanmar}]", 4.0),
    (r"\p{Tibetan}", 3.6),
    (r"\p{Hangul}", 1.95),
    (r"\p{Ethiopic}", 2.6),
    (r"[\p{Arabic}\p{Hebrew}\p{Syriac}]", 3.7),
    (r"[\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Gujarati}\p{Oriya}\p{Telugu}\p{Kannada}\p{Malayalam}\p{Sinhala}]", 3.1),
    (r"\p{Tamil}", 4.0),
    (r"", 5.5),
)
"""Script -> how many letters, combining marks aside, say as much as one English word; the first that is found in a run. Alphabets
of Europe need 4.5 to 6.1 of them."""

LETTERS_OF_ENGLISH = 5
"""Letters of an English word, rounded."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word, or a mark between words."""

    text: str
    says: float
    """As how many English words its letters count; 1 for numbers, 0 for marks."""

    @property
    def is_mark(self) -> bool:
        return not self.says


@dataclass(frozen=True)
class Patterns:
    """Compiled once, where first needed: `regex` takes its time."""

    words: Any
    run: Any
    """The beginning of a run without spaces."""
    not_bare: Any
    scripts: tuple[tuple[Any, float], ...]


@lru_cache(maxsize=1)
def patterns() -> Patterns:
    import regex

    return Patterns(
        words=regex.compile(WORD_PATTERN, regex.V1),
        run=regex.compile(f"[{UNSPACED}]", regex.V1),
        not_bare=regex.compile(r"[\p{M}\p{Cf}_]", regex.V1),
        scripts=tuple((regex.compile(script, regex.V1), letters) for script, letters in LETTERS_PER_ENGLISH_WORD),
    )


def tokens_in(text: str) -> list[str]:
    """Words, marks between them, and whole runs of scripts without spaces."""
    return patterns().words.findall(text)  # type: ignore[no-any-return]


def has_unspaced(text: str) -> bool:
    """Whether some of it, or all if it is a token, is in a script without spaces."""
    return not text.isascii() and patterns().run.search(text) is not None


@lru_cache(maxsize=2)
def words_in(text: str) -> tuple[Word, ...]:
    """The words of a text and the marks between them, in order."""
    if not has_unspaced(text):
        return tuple(map(spaced_word, tokens_in(text)))
    words: list[Word] = []
    for token in tokens_in(text):
        if has_unspaced(token):
            letters = letters_per_word(token)
            words += [Word(word, says(word, letters)) for word in cut_run(token)]
        else:
            words.append(spaced_word(token))
    return tuple(words)


@lru_cache(maxsize=1 << 16)
def spaced_word(token: str) -> Word:
    return Word(token, says(token, letters_per_word(token)))


def letters_per_word(run: str) -> float:
    """How many letters say as much as an English word, in the script of the run."""
    if run.isascii():
        return LETTERS_PER_ENGLISH_WORD[-1][1]
    return next(letters for script, letters in patterns().scripts if script.search(run))


def says(word: str, letters: float) -> float:
    if not any(map(str.isalnum, word)):
        return 0.0
    return len(bare_letters(word)) / letters if any(map(str.isalpha, word)) else 1.0


def bare_letters(word: str) -> str:
    """The word without combining marks and what does not show; the word itself where nothing else is left."""
    return word if word.isascii() else patterns().not_bare.sub("", word) or word


def cut_run(run: str) -> list[str]:
    """The words of a run of characters of one of the scripts without spaces."""
    from icu4py.breakers import WordBreaker

    return list(WordBreaker(run, "und")) if len(run) > 1 else [run]


@dataclass(frozen=True)
class MeasuredText:
    """A text in which runs of words are as long as they would be in English, for bounds on shares of its characters."""

    text: str
    """With spaces between words where the script has none, and with Chinese characters three times and Japanese ones twice:
    one of them says as much as so many letters."""
    scale: float
    """How many words say as much as one English word; at least 1, which it is wherever words stand between spaces."""


def measure(text: str) -> MeasuredText:
    if not has_unspaced(text):
        return MeasuredText(text, 1.0)
    words, content = 0, 0.0

    def spread(match: Any) -> str:
        nonlocal words, content
        token = str(match[0])
        if not has_unspaced(token):
            words, content = words + 1, content + 1.0
            return token
        letters = letters_per_word(token)
        cut = cut_run(token)
        words, content = words + len(cut), content + sum(says(word, letters) for word in cut)
        times = max(1, round(LETTERS_OF_ENGLISH / letters))
        return " ".join("".join(character * times for character in word) for word in cut)

    spaced = patterns().words.sub(spread, text)
    return MeasuredText(spaced, max(1.0, words / max(content, 1.0)))


@lru_cache(maxsize=2)
def any_script_words(cut: bool = True) -> WordTokenizer:
    """The words of a text for datatrove's filters and its near-duplicate search; `cut`: whether ICU cuts runs without spaces.

    datatrove's own word tokenizers need to be told the language, and take a Chinese sentence for one English word.
    """
    from datatrove.utils.word_tokenizers import WordTokenizer

    class AnyScriptWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return [word.text for word in words_in(text)] if cut else tokens_in(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            """Sentences cannot be told apart in every script, so a text is one."""
            return [(0, len(text))]

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

    return AnyScriptWords()


@lru_cache(maxsize=1)
def bare_words() -> WordTokenizer:
    """The words of a text as `any_script_words`, marks between them as well, without combining marks: for their lengths."""
    cut = any_script_words()

    class BareWords(type(cut)):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return [bare_letters(word) for word in cut.word_tokenize(text)]

    return BareWords()
