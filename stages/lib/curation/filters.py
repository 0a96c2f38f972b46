"""What a text must be like to be kept. Each filter names the reason why it drops a text.

To add one: fields in `Filters`, a function that builds its judge from them, and a line in `FILTERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from pydantic import Field

from pipeline.settings.strict import Strict


class Repetition(Strict):
    """How much of a text may be said twice: Table A1 of Rae et al. 2021 (Gopher, arXiv:2112.11446), through datatrove.

    A word is a run of letters and digits; in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) it is
    what ICU's dictionaries find. There, runs are of so many words as say as much as 2 to 10 English ones, and are measured
    with spaces between words: stages/lib/curation/words.py. So the same content is judged alike.
    """

    min_words: int = Field(default=50, ge=1)
    """Texts of fewer words are not judged: in a short text every phrase is a large share of it."""
    max_duplicate_line_fraction: float | None = Field(default=0.30, gt=0.0, le=1.0)
    """Largest share of lines that stood before in the text. null: not judged."""
    max_duplicate_paragraph_fraction: float | None = Field(default=0.30, gt=0.0, le=1.0)
    """Largest share of paragraphs (between blank lines) that stood before. null: not judged."""
    max_duplicate_line_character_fraction: float | None = Field(default=0.20, gt=0.0, le=1.0)
    """Largest share of characters in lines that stood before. null: not judged."""
    max_duplicate_paragraph_character_fraction: float | None = Field(default=0.20, gt=0.0, le=1.0)
    """Largest share of characters in paragraphs that stood before. null: not judged."""
    max_top_ngram_fractions: list[float] | None = Field(default=[0.20, 0.18, 0.16], min_length=1, max_length=3)
    """Largest shares of characters in the most frequent run of 2, 3 and 4 words. null: not judged."""
    max_duplicate_ngram_fractions: list[float] | None = Field(
        default=[0.15, 0.14, 0.13, 0.12, 0.11, 0.10], min_length=1, max_length=6
    )
    """Largest shares of characters in runs of 5, 6, 7, 8, 9 and 10 words that stood before. null: not judged."""


class Quality(Strict):
    """What prose looks like: Section A1.1 of Rae et al. 2021 (Gopher, arXiv:2112.11446), through datatrove.

    Language-agnostic: no stop words, and mean word lengths only where set (1.6 in Chinese, 5 in English, 7 in Finnish;
    combining marks are not counted). Of languages with few long words, such as Korean or Malayalam, words count as so many
    English ones as their letters say. Made for web text: source code, poems and tables fail it.
    """

    min_words: int | None = Field(default=50, ge=1)
    """Fewest words, marks aside, or as much as so many English words. null: not judged."""
    max_words: int | None = Field(default=100_000, ge=1)
    """Most words, marks aside. null: not judged."""
    min_mean_word_characters: float | None = Field(default=None, gt=0.0)
    """Smallest mean length of a word in characters. null: not judged. Gopher has 3, for English."""
    max_mean_word_characters: float | None = Field(default=10.0, gt=0.0)
    """Largest mean length of a word in characters. null: not judged."""
    max_symbols_per_word: float | None = Field(default=0.1, gt=0.0)
    """Most hash signs per word, and most ellipses per word. null: not judged."""
    max_bullet_line_fraction: float | None = Field(default=0.9, gt=0.0, le=1.0)
    """Largest share of lines that begin with a bullet or a hyphen. null: not judged."""
    max_ellipsis_line_fraction: float | None = Field(default=0.3, gt=0.0, le=1.0)
    """Largest share of lines that end with an ellipsis. null: not judged."""
    min_alphabetic_word_fraction: float | None = Field(default=0.8, gt=0.0, le=1.0)
    """Smallest share of words and marks that hold a letter; words weigh as much as they say. null: not judged."""


class Filters(Strict):
    """Bounds on the text of a row: for chats all messages, for questions context and question, and so on."""

    min_characters: int | None = Field(default=1, ge=1)
    """Fewest characters. null: not judged."""
    max_characters: int | None = Field(default=None, ge=1)
    """Most characters. null: not judged."""
    max_line_characters: int | None = Field(default=None, ge=1)
    """Most characters in one line: minified code and data tables have long ones. null: not judged."""
    min_alphanumeric_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Smallest share of letters and digits, of any script, among the characters that are no spaces. null: not judged."""
    repetition: Repetition | None = None
    """Bounds on what is said twice; {} takes the defaults. null: not judged."""
    quality: Quality | None = None
    """Bounds on what is no prose; {} takes the defaults. null: not judged."""


Judge = Callable[[str], str | None]
"""A text -> None to keep it, or the reason to drop it."""


def length(filters: Filters) -> Judge | None:
    low, high = filters.min_characters, filters.max_characters
    if low is None and high is None:
        return None

    def judge(text: str) -> str | None:
        if low is not None and len(text) < low:
            return "too_short"
        return "too_long" if high is not None and len(text) > high else None

    return judge


def lines(filters: Filters) -> Judge | None:
    most = filters.max_line_characters
    if most is None:
        return None
    return lambda text: "long_line" if max(map(len, text.split("\n"))) > most else None


def alphanumeric(filters: Filters) -> Judge | None:
    least = filters.min_alphanumeric_fraction
    if least is None:
        return None

    def judge(text: str) -> str | None:
        visible = "".join(text.split())
        return "few_letters" if sum(map(str.isalnum, visible)) < least * max(len(visible), 1) else None

    return judge


def repetition(filters: Filters) -> Judge | None:
    bounds = filters.repetition
    if bounds is None:
        return None
    from datatrove.utils.text import split_into_words

    from stages.lib.curation.words import any_script_words, measure

    whole_runs = any_script_words(cut=False)
    build = lru_cache(maxsize=256)(partial(repetition_filter, bounds))

    def judge(text: str) -> str | None:
        measured = measure(text)
        if len(split_into_words(measured.text, whole_runs)) < bounds.min_words:
            return None
        gopher, names = build(round(measured.scale, 1))
        reason = datatrove_reason(gopher, measured.text, "repetition")
        return names.get(reason, reason) if reason else None

    return judge


def repetition_filter(bounds: Repetition, scale: float) -> tuple[Any, dict[str, str]]:
    """The filter for texts whose words say `scale` times less than English ones, and its reasons -> those of English texts."""
    from datatrove.pipeline.filters import GopherRepetitionFilter

    from stages.lib.curation.words import any_script_words

    top = [(round(n * scale), n, most) for n, most in enumerate(bounds.max_top_ngram_fractions or (), start=2)]
    again = [(round(n * scale), n, most) for n, most in enumerate(bounds.max_duplicate_ngram_fractions or (), start=5)]
    gopher = GopherRepetitionFilter(
        dup_line_frac=bounds.max_duplicate_line_fraction,
        dup_para_frac=bounds.max_duplicate_paragraph_fraction,
        dup_line_char_frac=bounds.max_duplicate_line_character_fraction,
        dup_para_char_frac=bounds.max_duplicate_paragraph_character_fraction,
        top_n_grams=tuple((length, most) for length, _, most in top),
        dup_n_grams=tuple((length, most) for length, _, most in again),
        language=any_script_words(cut=False),
    )
    names = {f"repetition_top_{length}_gram": f"repetition_top_{n}_gram" for length, n, _ in top}
    names |= {f"repetition_duplicated_{length}_n_grams": f"repetition_duplicated_{n}_n_grams" for length, n, _ in again}
    return gopher, names


def quality(filters: Filters) -> Judge | None:
    bounds = filters.quality
    if bounds is None:
        return None
    from datatrove.pipeline.filters import GopherQualityFilter

    from stages.lib.curation.words import bare_words, words_in

    gopher = GopherQualityFilter(
        # Judged below, where it counts how much words say: datatrove takes all words for English ones.
        min_doc_words=None,
        max_non_alpha_words_ratio=None,
        max_doc_words=bounds.max_words,
        min_avg_word_length=bounds.min_mean_word_characters,
        max_avg_word_length=bounds.max_mean_word_characters,
        max_symbol_word_ratio=bounds.max_symbols_per_word,
        max_bullet_lines_ratio=bounds.max_bullet_line_fraction,
        max_ellipsis_lines_ratio=bounds.max_ellipsis_line_fraction,
        min_stop_words=None,
        language=bare_words(),
    )

    def judge(text: str) -> str | None:
        found = words_in(text)
        words = [word for word in found if not word.is_mark]
        # datatrove divides by the number of words, which it does not expect to be zero.
        if not words:
            return "quality_no_words"
        says = max(len(words), sum(word.says for word in words))
        if bounds.min_words is not None and says < bounds.min_words:
            return "quality_short_doc"
        if reason := datatrove_reason(gopher, text, "quality"):
            return reason
        alphabetic = sum(any(map(str.isalpha, word.text)) for word in words) / len(words)
        marks = len(found) - len(words)
        if (
            bounds.min_alphabetic_word_fraction is not None
            and alphabetic * says < bounds.min_alphabetic_word_fraction * (says + marks)
        ):
            return "quality_below_alpha_threshold"
        return None

    return judge


FILTERS: dict[str, Callable[[Filters], Judge | None]] = {
    "length": length,
    "lines": lines,
    "alphanumeric": alphanumeric,
    "repetition": repetition,
    "quality": quality,
}
"""In the order in which they judge: the cheap ones first. None means the filter is off."""


def build_judge(filters: Filters) -> Judge:
    """One judge of all filters that are on: the first reason found."""
    judges = [judge for build in FILTERS.values() if (judge := build(filters))]
    return lambda text: next((reason for judge in judges if (reason := judge(text))), None)


def datatrove_reason(step: Any, text: str, prefix: str) -> str | None:
    """What a datatrove filter says of the text."""
    from datatrove.data import Document

    result = step.filter(Document(text=text, id=""))
    keep, reason = result if isinstance(result, tuple) else (result, "dropped")
    return None if keep else f"{prefix}_{reason.removeprefix('gopher_')}"
