"""What data's own numbers say of two answers of which one is to be the better: they may say that it is the worse one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.layouts_between import told_in_words
from stages.lib.sources.proposing.columns import MAJORITY
from stages.lib.sources.proposing.forms import plain_name

MORE_IS_BETTER = frozenset(
    "score scores rating ratings rate rated reward rewards grade grades points stars star votes upvotes likes quality "
    "overall helpfulness preference".split()
)
LESS_IS_BETTER = frozenset("rank ranks ranking rankings".split())
"""Words in names of columns whose numbers judge answers."""

UNORDERED = 0.2
"""A list of answers is not in order where more than this share of its numbers are not: of one in any order half are."""

PAIR = ("chosen", "rejected")
"""How numbers are named after answers that have other names."""

Pair = tuple[Any, Any]
"""What is said of the better answer and of the worse one."""


def reversed_by_numbers(form_layout: str, columns: dict[str, str], rows: Sequence[Row]) -> str | None:
    """What to say of a layout of ordered pairs, read from these columns (ours -> theirs), where most numbers beside the pair
    say that the answer taken as the worse one is the better; None where they do not, where others say that it is not, or
    where there are none."""
    as_it_stands = f"--layout {form_layout} takes them as they stand."
    if {"chosen", "rejected"} <= columns.keys():
        better, worse = columns["chosen"], columns["rejected"]
        found = against(judged_pairs(better, worse, rows))
        swap = f"--set columns.chosen={worse} --set columns.rejected={better} takes them the other way round"
        return (
            f"{found} for '{worse}' than for '{better}', which is to be better. {swap}; {as_it_stands}"
            if found
            else None
        )
    if form_layout == "preference_alpaca" and "output" in columns:
        answers = columns["output"]
        found = against(judged_lists(answers, rows))
        than = f"for the last of '{answers}' than for the first, which is to be the best"
        return f"{found} {than}. Write the answers anew, best first; {as_it_stands}" if found else None
    if form_layout == "preference_between" and {"output_1", "output_2", "preference"} <= columns.keys():
        first, second = columns["output_1"], columns["output_2"]
        found = against(judged_choices(first, second, columns["preference"], rows))
        swap = f"--set columns.output_1={second} --set columns.output_2={first} takes them the other way round"
        than = f"for the answer that '{columns['preference']}' does not prefer"
        return f"{found} {than}. {swap}; {as_it_stands}" if found else None
    return None


@dataclass(frozen=True)
class NumbersBeside:
    """Numbers beside pairs of answers."""

    said: str
    """Where they stand, with a verb."""
    less_is_better: bool
    pairs: list[Pair]
    least: float = 0.5
    """Above which share of them they count."""

    @property
    def reversed(self) -> list[bool]:
        """Of each pair of numbers that differ, whether the worse answer's is the better one."""
        numbers = [(number_in(better), number_in(worse)) for better, worse in self.pairs]
        return [
            (worse > better) != self.less_is_better
            for better, worse in numbers
            if better is not None and worse is not None and better != worse
        ]


def against(judged: Iterable[NumbersBeside]) -> str | None:
    """The beginning of a sentence on the first of them that mostly say the reverse; None if others mostly do not."""
    told = None
    for each in judged:
        found = each.reversed
        if found and sum(found) > each.least * len(found):
            than = "lower" if each.less_is_better else "higher"
            told = told or f"in {sum(found):,} of {len(found):,} rows {each.said} {than}"
        elif found and each.least <= 0.5:
            return None
    return told


def judged_lists(answers: str, rows: Sequence[Row]) -> Iterator[NumbersBeside]:
    """The numbers of the first and the last answer of a list: these become the pair."""
    for name in names_in_rows(rows):
        if name == answers or (less := judging(name)) is None:
            continue
        both = [(row.get(name), row.get(answers)) for row in rows]
        lists = [n for n, texts in both if isinstance(n, list) and isinstance(texts, list) and len(n) == len(texts) > 1]
        yield NumbersBeside(f"'{name}' is", less, [(each[0], each[-1]) for each in lists], UNORDERED)


def judged_choices(first: str, second: str, preference: str, rows: Sequence[Row]) -> Iterator[NumbersBeside]:
    """The numbers of two answers, that of the preferred one first: 1 prefers the first, 2 the second."""
    names = names_in_rows(rows)
    for name in names:
        less = judging(name)
        other = counterpart(name, stems_of(first, second), names)
        if less is None or other is None or preference in (name, other):
            continue
        pairs = [
            (row.get(name), row.get(other)) if preferred < 1.5 else (row.get(other), row.get(name))
            for row in rows
            if (preferred := choice_in(row.get(preference))) is not None and preferred != 1.5
        ]
        yield NumbersBeside(f"'{name}' and '{other}' are", less, pairs)


def choice_in(value: Any) -> float | None:
    """Which answer is preferred, as a number from 1 to 2; None where the value is neither a number nor a word for it."""
    told = told_in_words(value)
    return number_in(value) if told is None else told


def judged_pairs(better: str, worse: str, rows: Sequence[Row]) -> Iterator[NumbersBeside]:
    """Every two numbers beside the pair: in two columns, under two names in one, or in a list, of which nobody says which
    number is whose."""
    names = names_in_rows(rows)
    stems = stems_of(better, worse)
    stems += [] if any(set(stem) == set(PAIR) for stem in stems) else [PAIR]
    for name in names:
        less = judging(name)
        if less is None or name in (better, worse):
            continue
        if (other := counterpart(name, stems, names)) is not None:
            yield NumbersBeside(f"'{name}' and '{other}' are", less, [(row.get(name), row.get(other)) for row in rows])
            continue
        values = [row.get(name) for row in rows]
        named = [(value.get(better), value.get(worse)) for value in values if isinstance(value, dict)]
        yield NumbersBeside(f"'{name}' is", less, named)
        listed = [(value[0], value[1]) for value in values if isinstance(value, list) and len(value) == 2]
        yield NumbersBeside(f"'{name}' is", less, listed, MAJORITY)


def names_in_rows(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def judging(name: str) -> bool | None:
    """Whether of the numbers in a column of this name the smaller is better; None where they judge nothing."""
    words = set(plain_name(name).split("_"))
    if words & LESS_IS_BETTER:
        return True
    return False if words & MORE_IS_BETTER else None


def stems_of(one: str, other: str) -> list[tuple[str, str]]:
    """What tells the two names apart, by which others may be told apart too: the names, and the one word that differs."""
    words = list(zip(plain_name(one).split("_"), plain_name(other).split("_"), strict=False))
    different = [pair for pair in words if pair[0] != pair[1]]
    return [(one, other), *(different if len(different) == 1 and len(words) > 1 else [])]


def counterpart(name: str, stems: Sequence[tuple[str, str]], names: Iterable[str]) -> str | None:
    """The name that says of the other answer what `name` says of the one: `score_rejected` of `score_chosen`."""
    plain = plain_name(name)
    for one, other in stems:
        wanted = re.sub(rf"(?<![a-z0-9]){re.escape(plain_name(one))}(?![a-z0-9])", plain_name(other), plain)
        if wanted != plain:
            return next((each for each in names if plain_name(each) == wanted), None)
    return None


def number_in(value: Any) -> float | None:
    """The number, also where it is written as a text, as in CSV."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        return None
    return None if math.isnan(number) else number
