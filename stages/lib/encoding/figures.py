"""Figures behind the metrics, for those who want to know where a model fails: `figures.json` of an artifact.

They are counted from what was found row by row, never from numbers that depend on how rows were spread over processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stages.lib.formulas.metrics import Tally
from stages.lib.rows.canonical import Row

FIGURES = "figures.json"


PER_SOURCE = "per_source"


PER_LENGTH = "per_length_tokens"
"""How many tokens a text has, both texts of a pair together, or the context of a question."""


def as_figures(tally: Tally) -> dict[str, float]:
    """A tally with its precision, recall and F1."""
    counts = {"wanted": int(tally.wanted), "found": int(tally.found), "right": int(tally.right)}
    return {**counts, "precision": tally.precision, "recall": tally.recall, "f1": tally.f1}


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """What was wanted -> what was found instead, or rightly -> how often; pairs that never occur are left out."""
    counts: dict[str, Counter[str]] = {}
    for wanted, found in pairs:
        counts.setdefault(wanted, Counter())[found] += 1
    return {wanted: dict(sorted(counts[wanted].items())) for wanted in sorted(counts)}


def source_groups(rows: Sequence[Row]) -> list[str]:
    """The source of each row; "" where it says none."""
    return [str(row.get("source", "")) for row in rows]


def length_groups(lengths: Sequence[int]) -> list[str]:
    """The range of lengths that each lies in: 1-8, 9-16, 17-32, ..., each twice as wide as the one before."""
    highest = [max(8, 1 << (length - 1).bit_length()) if length else 8 for length in lengths]
    return [f"{high // 2 + 1}-{high}" if high > 8 else "0-8" for high in highest]


def figures_of_groups(
    groups: Mapping[str, Sequence[str]], measure: Callable[[Sequence[int]], Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """What `measure` says of the rows of each group. `groups`: name -> the group of each row."""
    found: dict[str, dict[str, Any]] = {}
    for name, group_of in groups.items():
        members: dict[str, list[int]] = {}
        for index, group in enumerate(group_of):
            members.setdefault(group, []).append(index)
        ordered = sorted(members, key=(lambda group: int(group.split("-")[0])) if name == PER_LENGTH else None)
        found[name] = {group: dict(measure(members[group])) for group in ordered}
    return found
