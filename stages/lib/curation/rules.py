"""Cleaning by rule: what a recipe declares is dropped from the rows, or rewritten in them, and counted by the rule's name.

To add one: a params class in rule_params.py, and here a function of its params that gives a judge of rows, or a change of
texts, and a line in `JUDGES` or `CHANGES`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html.entities import html5
from typing import Any

from stages.lib.curation.languages import share_of_languages, share_of_scripts
from stages.lib.curation.phrases import TEX_COMMANDS
from stages.lib.curation.rule_params import (
    AnswerEqualsPromptRule,
    EndMarksRule,
    EscapesRule,
    HtmlEntitiesRule,
    LanguageRule,
    PatternRule,
    PlaceholderRule,
    RefusalRule,
    Rule,
    ScriptRule,
    ShareRule,
    rule_names,
)
from stages.lib.curation.said import Said, rewrite_texts, shown_change, texts_said
from stages.lib.rows.canonical import Row
from stages.lib.rows.ledger import Ledger


@dataclass
class Ruled:
    """What became of a row."""

    row: Row
    dropped_by: str | None = None
    """The name of the rule that drops it."""
    rewritten_by: dict[str, str] = field(default_factory=dict)
    """The names of the rules that changed it, each with the first thing that it changed."""
    not_judged_by: list[str] = field(default_factory=list)
    """The names of the rules to which it gave too little to judge it by."""


@dataclass
class Ruling:
    """What rules did to the rows of a source."""

    rules: Sequence[Rule]
    examples: dict[str, str] = field(default_factory=dict)
    """Name of a rule that changed something -> where, and what, it changed first."""
    met: set[str] = field(default_factory=set)
    """The names of the rules that dropped or changed a row."""

    def add(self, where: str, ruled: Ruled) -> None:
        """Takes note of what became of a row, whether or not something else drops it afterwards."""
        self.met.update(ruled.rewritten_by, [ruled.dropped_by] if ruled.dropped_by else [])
        for name, change in ruled.rewritten_by.items():
            self.examples.setdefault(name, f"{where}: {change}")

    def notes(self) -> Iterator[str]:
        """What the user should know of them besides the numbers of the ledger."""
        for name, example in self.examples.items():
            yield f"rule_{name} rewrote, for example, {example}"
        if idle := [name for name in rule_names(self.rules) if name not in self.met]:
            yield f"rules that found nothing to do: {', '.join(idle)}"


def count_ruled(ledger: Ledger, rewritten_by: Iterable[str], not_judged_by: Iterable[str]) -> None:
    """Counts in the ledger what rules did to a row that is kept."""
    for name in rewritten_by:
        ledger.repaired[f"rule_{name}"] += 1
    for name in not_judged_by:
        ledger.noticed[f"kept, because they have too few letters for rule_{name} to judge them"] += 1


class NotJudged(Exception):
    """The row gives too little to judge it by."""


Judge = Callable[[list[Said]], bool]
"""The texts of a row that a rule looks at -> whether the row is dropped. May raise `NotJudged`."""

Change = Callable[[str], str]
"""A text -> the text that takes its place."""


def build_rules(rules: Sequence[Rule], format: str) -> Callable[[Row], Ruled]:
    """A function of a row: what the rules make of it, in their order. The first that drops it is the last that acts."""
    steps = [
        (name, frozenset(rule.parts(format)), build_change(rule), build_judge_of_rows(rule))
        for name, rule in zip(rule_names(rules), rules, strict=True)
    ]

    def apply(row: Row) -> Ruled:
        ruled = Ruled(row)
        for name, parts, change, judge in steps:
            if change is not None:
                changed = rewrite_texts(ruled.row, parts, change)
                if changed != ruled.row:
                    ruled.rewritten_by[name] = shown_change(ruled.row, changed)
                    ruled.row = changed
                continue
            assert judge is not None
            try:
                if judge([said for said in texts_said(ruled.row) if said.part in parts]):
                    ruled.dropped_by = name
                    break
            except NotJudged:
                ruled.not_judged_by.append(name)
        return ruled

    return apply


def build_change(rule: Rule) -> Change | None:
    """What a rule does to a text; None if it drops rows."""
    return CHANGES[type(rule)](rule) if rule.rewrites() else None


def build_judge_of_rows(rule: Rule) -> Judge | None:
    """Which rows a rule drops; None if it rewrites texts."""
    return None if rule.rewrites() else JUDGES[type(rule)](rule)


# What drops rows


def pattern_judge(rule: PatternRule) -> Judge:
    import re2

    pattern = re2.compile(rule.pattern)
    required = rule.action == "require"
    return lambda said: any(pattern.search(each.text) is not None for each in said) != required


def share_judge(rule: ShareRule, share_of: Callable[[str], float | None]) -> Judge:
    low = 0.0 if rule.min_fraction is None else rule.min_fraction
    high = 1.0 if rule.max_fraction is None else rule.max_fraction

    def judge(said: list[Said]) -> bool:
        share = share_of("\n".join(each.text for each in said))
        if share is None:
            raise NotJudged
        return not low <= share <= high

    return judge


def script_judge(rule: ScriptRule) -> Judge:
    return share_judge(rule, share_of_scripts(rule.scripts))


def language_judge(rule: LanguageRule) -> Judge:
    return share_judge(rule, share_of_languages(frozenset(rule.languages), rule.min_letters))


def placeholder_judge(rule: PlaceholderRule) -> Judge:
    values = frozenset(map(without_frame, rule.values))
    return lambda said: any(without_frame(each.text) in values for each in said)


def repeated_prompt_judge(rule: AnswerEqualsPromptRule) -> Judge:
    def repeats(said: Said) -> bool:
        if said.asked is None or not (answer := bare(said.text)):
            return False
        return answer in (bare(said.asked), bare(said.asked.strip().split("\n\n")[0]))

    return lambda said: any(map(repeats, said))


def refusal_judge(rule: RefusalRule) -> Judge:
    phrases = re.compile("|".join(whole_phrase(fold(phrase)) for phrase in rule.phrases))
    return lambda said: any(phrases.search(fold(each.text[: rule.first_characters])) for each in said)


def whole_phrase(phrase: str) -> str:
    """A pattern of the phrase, whose first and last words are whole: "as an ai model" is not in "was an ai modeller"."""
    begins, ends = (character.isascii() and character.isalnum() for character in (phrase[0], phrase[-1]))
    return f"{'(?<![a-z0-9])' if begins else ''}{re.escape(phrase)}{'(?![a-z0-9])' if ends else ''}"


QUOTES = str.maketrans("\u2018\u2019\u02bc\u201c\u201d", "'''\"\"")


def fold(text: str) -> str:
    """The text without what does not count in comparisons: case, widths, kinds of quotes and spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(QUOTES).split())


def bare(text: str) -> str:
    """The folded text without marks at its ends that change nothing of what it says."""
    folded = fold(text)
    return folded.strip(" .,;:!?。、！？；：'\"`*") or folded


FRAME = re.compile(r"[\s_\-<>\[\](){}|【】《》「」]")


def without_frame(text: str) -> str:
    """The bare text without spaces, hyphens and brackets: <No-Output> is nooutput. A long text, which is none, as it is."""
    return FRAME.sub("", bare(text)) if len(text) <= LONGEST_PLACEHOLDER else text


LONGEST_PLACEHOLDER = 1_000


# What rewrites texts


def pattern_change(rule: PatternRule) -> Change:
    import re2

    pattern, replacement = re2.compile(rule.pattern), rule.replacement
    return lambda text: pattern.sub(replacement, text)


def placeholder_change(rule: PlaceholderRule) -> Change:
    values = frozenset(map(without_frame, rule.values))

    def change(text: str) -> str:
        rest, break_, last = text.rstrip().rpartition("\n\n")
        return rest.rstrip() if break_ and rest.strip() and without_frame(last) in values else text

    return change


ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def html_change(rule: HtmlEntitiesRule) -> Change:
    # Without a semicolon, as html.unescape reads them too, they stand in addresses: ?a=1&copy=2.
    return lambda text: ENTITY.sub(entity_character, text)


def entity_character(match: re.Match[str]) -> str:
    entity = match[0]
    return html.unescape(entity) if entity[1] == "#" or entity[1:] in html5 else entity


ESCAPE = re.compile(rf"(?<!\\)\\(?!(?:{'|'.join(TEX_COMMANDS)})(?![A-Za-z]))(?:r\\n|n|t)")

BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")

WINDOWS_PATH = re.compile(r"[\"'(<\[]*(?:[C-H]:\\|\\\\)")

LONGEST_PATH = 260


def escapes_change(rule: EscapesRule) -> Change:
    def change(text: str) -> str:
        if not rule.beside_line_breaks and "\n" in BLANK_LINES.sub(" ", text.strip()):
            return text
        return ESCAPE.sub(escaped_character, text)

    return change


def escaped_character(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    quoted = start > 0 and end < len(text) and text[start - 1] in "\"'`" and text[start - 1] == text[end]
    word = text[max(0, start - LONGEST_PATH) : end].split()[-1]
    if quoted or WINDOWS_PATH.match(word):
        return match[0]
    return "\t" if match[0] == r"\t" else "\n"


def end_change(rule: EndMarksRule) -> Change:
    marks = tuple(rule.marks)

    def change(text: str) -> str:
        rest = text.rstrip()
        if not rest.endswith(marks):
            return text
        while found := next((mark for mark in marks if rest.endswith(mark)), None):
            rest = rest.removesuffix(found).rstrip()
        return rest

    return change


JUDGES: dict[type, Callable[[Any], Judge]] = {
    PatternRule: pattern_judge,
    ScriptRule: script_judge,
    LanguageRule: language_judge,
    PlaceholderRule: placeholder_judge,
    AnswerEqualsPromptRule: repeated_prompt_judge,
    RefusalRule: refusal_judge,
}
"""Params of a rule -> its judge, where the rule drops rows."""

CHANGES: dict[type, Callable[[Any], Change]] = {
    PatternRule: pattern_change,
    PlaceholderRule: placeholder_change,
    HtmlEntitiesRule: html_change,
    EscapesRule: escapes_change,
    EndMarksRule: end_change,
}
"""Params of a rule -> its change of a text, where the rule rewrites."""
