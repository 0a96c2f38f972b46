"""What a recipe says of its rules for cleaning. Imports nothing heavy, because `slipway plan` reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.errors import Problem, did_you_mean
from pipeline.settings.strict import Strict
from stages.lib.curation.languages import LANGUAGES, SCRIPTS
from stages.lib.curation.phrases import END_MARKS, PLACEHOLDERS, REFUSALS
from stages.lib.curation.rule_parts import ALL, ANSWERED, ASKED, CHOSEN, PARTS, SAID, SINGLE, TEXTS, Part
from stages.lib.rows.canonical import FORMATS


class NamedRule(Strict):
    """What all rules have in common."""

    name: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """What the ledger counts it by, after `rule_`: lower-case letters, digits and underscores. null: its kind; a second one of a kind without a name gets a number."""
    where: list[Part] | None = Field(default=None, min_length=1)
    """The parts of a row that it looks at: text; user, assistant and system for turns (of pairs and prompts, those of the prompt); chosen and rejected for the answers of pairs, completion for those without a pair; context and question. One that is as the rule says is enough. null: those that the kind is made for."""

    def rewrites(self) -> bool:
        """Whether it changes texts; else it drops rows."""
        return False

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        """Format -> the parts that it looks at where nothing else is said; a format that is missing has none."""
        return ALL

    def parts(self, format: str) -> tuple[Part, ...]:
        return tuple(self.where or self.usual().get(format, ()))


def readable_pattern(pattern: str) -> str:
    """The pattern, if RE2 can read it and it does not match where nothing stands."""
    import re2  # a few milliseconds, and only for recipes that have patterns

    if error := unreadable(pattern):
        raise ValueError(
            f"{pattern!r} is no regular expression of RE2: {error}. RE2 takes no longer for one text than for another of its "
            r"length. It has no lookaround and no backreferences, and the end of a text is \z: two rules often say the same."
        )
    compiled = re2.compile(pattern)
    if any((match := compiled.search(probe)) and match.start() == match.end() for probe in ("", "a b")):
        raise ValueError(
            f"{pattern!r} matches also where nothing stands. Ask for one character at least, such as + instead of *."
        )
    return pattern


def unreadable(pattern: str) -> str | None:
    """Why RE2 cannot read the pattern; None if it can."""
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0]
        return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return None


class PatternRule(NamedRule):
    """A regular expression."""

    kind: Literal["pattern"]
    """A regular expression: rows with a match are dropped, or rows without one, or what matches is replaced."""
    pattern: Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(readable_pattern)]
    r"""The regular expression, as RE2 reads it, in a time that grows with the text and no faster: (?i) at its beginning ignores case, (?s) lets a dot match line breaks, (?m) lets ^ and $ match at lines, \p{Han} is a script. It may match anywhere."""
    action: Literal["drop", "require", "replace"] = "drop"
    """drop: rows go in which a text of `where` matches. require: rows go in which none of them does. replace: what matches becomes `replacement`."""
    replacement: str | None = None
    r"""What stands in place of each match, with \1 for what its first group matched, for `action: replace`. '' takes the matches out."""

    @model_validator(mode="after")
    def check_replacement(self) -> PatternRule:
        if (self.action == "replace") != (self.replacement is not None):
            said = (
                "is needed with action: replace; '' takes matches out"
                if self.action == "replace"
                else "is for action: replace. Remove it, or set the action"
            )
            raise ValueError(f"replacement: {said}.")
        if self.replacement is not None and (error := unfit(self.pattern, self.replacement)):
            raise ValueError(f"replacement: {error}")
        return self

    def rewrites(self) -> bool:
        return self.action == "replace"


def unfit(pattern: str, replacement: str) -> str | None:
    """What is wrong with the replacement of a pattern; None if nothing is."""
    import re2

    groups = re2.compile(pattern).groups
    rest = replacement.replace("\\\\", "")
    for after in rest.split("\\")[1:]:
        if not after[:1].isdigit():
            return f"{replacement!r} has a backslash that is followed by no digit. Write two of them for one."
        if int(after[0]) > groups:
            return f"{replacement!r} names group {after[0]}, and the pattern has {groups}."
    return None


class ShareRule(NamedRule):
    """A share of the letters in `where`, all of them together."""

    min_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Smallest share of them, from 0 to 1: rows with less are dropped. null: none."""
    max_fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Largest share of them, from 0 to 1: rows with more are dropped. null: none."""

    @model_validator(mode="after")
    def check_bounds(self) -> ShareRule:
        low, high = self.min_fraction, self.max_fraction
        if low is None and high is None:
            raise ValueError("keeps every row. Set min_fraction, max_fraction or both.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"drops every row: min_fraction {low} is above max_fraction {high}.")
        return self

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        return SAID


class ScriptRule(ShareRule):
    """Which scripts a row is written in."""

    kind: Literal["script"]
    """The share of letters that belong to some scripts. A row without letters is not judged."""
    scripts: list[str] = Field(min_length=1)
    """Unicode's names of scripts, such as Latin, Han, Hiragana, Katakana, Hangul, Cyrillic, Arabic, Devanagari or Thai; what they have together counts."""

    @model_validator(mode="after")
    def check_scripts(self) -> ScriptRule:
        for script in self.scripts:
            if script not in SCRIPTS:
                raise ValueError(f"scripts: there is no script '{script}' ({did_you_mean(script, SCRIPTS)})")
        return self


class LanguageRule(ShareRule):
    """Which languages a row is written in."""

    kind: Literal["language"]
    """The share of letters that stand in text of some languages, as py3langid tells them. A row of fewer than min_letters letters is not judged, but counted."""
    languages: list[str] = Field(min_length=1)
    """Codes of languages (ISO 639-1), such as en, zh or th; what they have together counts."""
    min_letters: int = Field(default=20, ge=1)
    """Letters that a piece of text must have for its language to be told: shorter lines are told with those that follow. In Chinese five say as much as twenty in English."""

    @model_validator(mode="after")
    def check_languages(self) -> LanguageRule:
        for language in self.languages:
            if language not in LANGUAGES:
                raise ValueError(f"languages: py3langid knows no '{language}' ({did_you_mean(language, LANGUAGES)})")
        return self


class PlaceholderRule(NamedRule):
    """Texts that stand where nothing was to be said."""

    kind: Literal["placeholder"]
    """A text that is nothing but a placeholder, such as <nooutput> or N/A; case, and space around it, do not count."""
    values: list[Annotated[str, Field(min_length=1)]] = Field(default=list(PLACEHOLDERS), min_length=1)
    """The placeholders."""
    action: Literal["drop", "remove"] = "drop"
    """drop: the row goes. remove: a placeholder that is the last paragraph of a longer text is taken out, as where the layout alpaca puts an input below its instruction."""

    def rewrites(self) -> bool:
        return self.action == "remove"

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        return ASKED if self.action == "remove" else SINGLE


class AnswerEqualsPromptRule(NamedRule):
    """Answers that say again what was asked."""

    kind: Literal["answer_equals_prompt"]
    """An answer that is the message before it, or that message's first paragraph; case, spaces, and marks at the ends do not count."""

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        return CHOSEN


class RefusalRule(NamedRule):
    """Answers that begin with a refusal."""

    kind: Literal["refusal"]
    """An answer that says near its beginning that a language model cannot answer; case, and how quotes and commas are written, do not count."""
    phrases: list[Annotated[str, Field(min_length=1)]] = Field(default=list(REFUSALS), min_length=1)
    """What such answers say, in the languages of the data."""
    first_characters: int = Field(default=200, ge=1)
    """How many characters of a text are looked at: later on, such a phrase may be quoted."""

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        return {**CHOSEN, "text": ("text",)}


class HtmlEntitiesRule(NamedRule):
    """Characters written as HTML writes them."""

    kind: Literal["html_entities"]
    """Entities of HTML that end with a semicolon, such as &#39; and &amp;, become the characters that they stand for, once: what was escaped twice needs the rule twice."""

    def rewrites(self) -> bool:
        return True


class EscapesRule(NamedRule):
    """Line breaks and tabs written as in source code."""

    kind: Literal["escapes"]
    r"""A backslash and an n become a line break, a backslash and a t a tab. What is a command of TeX (\nu, \times), stands between quotes or in a path of Windows (C:\new), or follows another backslash stays."""
    beside_line_breaks: bool = False
    """Whether also texts are rewritten that have real line breaks: where lines are broken, a backslash and an n are likelier code. Blank lines, which layouts put between fields, do not count."""

    def rewrites(self) -> bool:
        return True


class EndMarksRule(NamedRule):
    """Marks of an end that were left in texts."""

    kind: Literal["end_marks"]
    """Marks with which models end a text or a turn, such as <|endoftext|>, </s> and <|im_end|>, are taken off its end, with the space before them."""
    marks: list[Annotated[str, Field(min_length=1)]] = Field(default=list(END_MARKS), min_length=1)
    """The marks."""

    def rewrites(self) -> bool:
        return True

    def usual(self) -> Mapping[str, tuple[Part, ...]]:
        return {**TEXTS, **ANSWERED}


Rule = (
    PatternRule
    | ScriptRule
    | LanguageRule
    | PlaceholderRule
    | AnswerEqualsPromptRule
    | RefusalRule
    | HtmlEntitiesRule
    | EscapesRule
    | EndMarksRule
)


def kind_of_rule(model: type[Strict]) -> str:
    """What a recipe writes as the `kind` of such a rule."""
    return str(get_args(model.model_fields["kind"].annotation)[0])


def has_known_rule(block: Any) -> Any:
    """The block itself; an unknown kind is told in our words. Whatever else is wrong is left for pydantic to report."""
    if isinstance(block, Mapping):
        known = [kind_of_rule(model) for model in get_args(Rule)]
        if "kind" not in block:
            raise ValueError(f"kind: is required ({did_you_mean('', known)})")
        if block["kind"] not in known:
            raise ValueError(f"kind: there is no rule '{block['kind']}' ({did_you_mean(str(block['kind']), known)})")
    return block


def told_apart(rules: list[Rule]) -> list[Rule]:
    """The rules, if each has a name of its own."""
    names = Counter(rule_names(rules))
    for name, count in names.items():
        if count > 1:
            raise ValueError(
                f"{count} rules are called '{name}', and are counted by name. Give each a name of its own."
            )
    return rules


def rule_names(rules: Sequence[Rule]) -> list[str]:
    """The name of each rule in ledger and messages."""
    seen: Counter[str] = Counter()
    names = []
    for rule in rules:
        seen[rule.kind] += rule.name is None
        names.append(rule.name or (rule.kind if seen[rule.kind] == 1 else f"{rule.kind}_{seen[rule.kind]}"))
    return names


Rules = Annotated[
    list[Annotated[Rule, Field(discriminator="kind"), BeforeValidator(has_known_rule)]], AfterValidator(told_apart)
]
"""Rules in the order in which they act."""


def misplaced_rules(rules: Sequence[Rule], format: str) -> Iterator[Problem]:
    """The rules that would do nothing, or harm, to rows of the format; `where` is relative to the list."""
    for index, rule in enumerate(rules):
        has = ", ".join(PARTS[format])
        if rule.rewrites() and not FORMATS[format].rewritten:
            what = f"rewrites, and {format} are never rewritten, because their offsets would move"
            yield Problem(f"{index}", what, "Drop such rows with a rule of kind pattern, or mend them before.")
        elif rule.kind == "answer_equals_prompt" and format not in ANSWERED:
            *others, last = ANSWERED
            yield Problem(
                f"{index}",
                f"compares an answer with its prompt, and {format} have none",
                f"It is for {', '.join(others)} and {last}: remove it.",
            )
        elif not rule.parts(format):
            hint = f"Name what it is to look at, such as where: [{PARTS[format][-1]}], or remove it."
            yield Problem(f"{index}", f"{rule.kind} looks at answers or questions, and {format} have {has}", hint)
        elif unknown := [part for part in rule.parts(format) if part not in PARTS[format]]:
            yield Problem(f"{index}.where", f"{format} have no {' and no '.join(unknown)}", f"They have {has}.")
        elif rule.kind == "answer_equals_prompt" and (other := set(rule.parts(format)) - set(ANSWERED[format])):
            yield Problem(
                f"{index}.where",
                f"{', '.join(sorted(other))} are no answers",
                f"Answers are {', '.join(ANSWERED[format])}.",
            )
        elif rule.rewrites() and len({"chosen", "rejected"} & set(rule.parts(format))) == 1:
            what = "rewrites one answer of a pair and not the other, which would tell them apart by what was rewritten"
            yield Problem(f"{index}.where", what, "Name both, chosen and rejected, or neither.")
