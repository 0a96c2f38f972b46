"""What data's own numbers say of two answers of which one is to be the better: they may say that it is the worse one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.proposing.columns import MAJORITY
from stages.lib.sources.proposing.forms import plain_name

MORE_IS_BETTER = frozenset(
    "score scores rating ratings rate rated reward rewards grade grades points stars star votes upvotes likes quality "
    "overall helpfulness preference".split()
)
LESS_IS_BETTER = frozenset("rank ranks ranking rankings".split())
"""Words in names of columns whose numbers judge answers."""

PAIR = ("chosen", "rejected")
"""How numbers are named after answers that have other names."""

Pair = tuple[Any, Any]
"""What is said of the better answer and of the worse one."""


def reversed_by_numbers(form_layout: str, columns: dict[str, str], rows: Sequence[Row]) -> str | None:
    """What to say of a layout of ordered pairs, read from these columns (ours -> theirs), where most numbers beside the pair
    say that the answer taken as the worse one is the better; None where they do not, or there are none."""
    if {"chosen", "rejected"} <= columns.keys():
        return reversed_pair(form_layout, columns["chosen"], columns["rejected"], rows)
    if form_layout == "preference_alpaca" and "output" in columns:
        return reversed_list(form_layout, columns["output"], rows)
    return None


def reversed_pair(layout: str, better: str, worse: str, rows: Sequence[Row]) -> str | None:
    for said, less_is_better, pairs, least in judged_pairs(better, worse, rows):
        if told := mostly_reversed(pairs, less_is_better, least):
            what = f"{told} rows {said} {'lower' if less_is_better else 'higher'} for '{worse}' than for '{better}'"
            swap = f"--set columns.chosen={worse} --set columns.rejected={better} takes them the other way round"
            return f"{what}, which is to be the worse answer. {swap}; --layout {layout} takes them as they are called."
    return None


def reversed_list(layout: str, answers: str, rows: Sequence[Row]) -> str | None:
    for name in names_in_rows(rows):
        less_is_better = judging(name)
        if name == answers or less_is_better is None:
            continue
        lists = [
            row[name]
            for row in rows
            if isinstance(row.get(name), list) and len(row[name]) == len(row.get(answers) or ()) > 1
        ]
        if told := mostly_reversed([(each[0], each[-1]) for each in lists], less_is_better, 0.5):
            than = "lower" if less_is_better else "higher"
            what = f"{told} rows '{name}' is {than} for the last of '{answers}' than for the first, which is to be the best"
            return f"{what}. Write the answers anew, best first; --layout {layout} takes them in the order in which they stand."
    return None


def judged_pairs(better: str, worse: str, rows: Sequence[Row]) -> Iterator[tuple[str, bool, list[Pair], float]]:
    """(how to say it, whether less is better, the numbers, above which share they count) of every two numbers beside the
    pair: in two columns, under two names in one, or in a list, of which nobody says which number is whose."""
    names = names_in_rows(rows)
    for name in names:
        less = judging(name)
        if less is None or name in (better, worse):
            continue
        if (other := counterpart(name, better, worse, names)) is not None:
            yield f"'{name}' and '{other}' are", less, [(row.get(name), row.get(other)) for row in rows], 0.5
            continue
        values = [row.get(name) for row in rows]
        named = [(value.get(better), value.get(worse)) for value in values if isinstance(value, dict)]
        yield f"'{name}' is", less, named, 0.5
        listed = [(value[0], value[1]) for value in values if isinstance(value, list) and len(value) == 2]
        yield f"'{name}' is", less, listed, MAJORITY


def names_in_rows(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def judging(name: str) -> bool | None:
    """Whether of the numbers in a column of this name the smaller is better; None where they judge nothing."""
    words = set(plain_name(name).split("_"))
    if words & LESS_IS_BETTER:
        return True
    return False if words & MORE_IS_BETTER else None


def counterpart(name: str, better: str, worse: str, names: Iterable[str]) -> str | None:
    """The name that says of the worse answer what `name` says of the better: `score_rejected` of `score_chosen`."""
    if name == better:
        return None
    stems = [(better, worse)] if {better, worse} == set(PAIR) else [(better, worse), PAIR]
    plain = plain_name(name)
    for one, other in stems:
        wanted = re.sub(rf"(?<![a-z]){re.escape(plain_name(one))}(?![a-z])", plain_name(other), plain)
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


def mostly_reversed(pairs: Iterable[Pair], less_is_better: bool, least: float) -> str | None:
    """`in 30 of 40` where more than the share `least` of the numbers that differ say the reverse."""
    numbers = [(number_in(better), number_in(worse)) for better, worse in pairs]
    different = [
        (worse > better) != less_is_better
        for better, worse in numbers
        if better is not None and worse is not None and better != worse
    ]
    against = sum(different)
    return f"in {against:,} of {len(different):,}" if different and against > least * len(different) else None
