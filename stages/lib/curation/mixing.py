"""Which rows are held out, and how many of which source are trained on. Rows are known by hashes, sizes and places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError, Problem
from stages.lib.rows.canonical import format_of_row, judged_text
from stages.lib.rows.ledger import Ledger

Unit = Literal["rows", "characters", "tokens"]


@dataclass(slots=True, eq=False)
class SourceRow:
    """One row of a source without its texts: where it stands in the file, its hashes and its sizes."""

    offset: int
    content: bytes
    """Digest of what it says."""
    shared: bytes
    """Digest of the prompt, context or text that it may share with rows of another group."""
    rank: float
    """Hash of its group, or of what it shares, as a number from 0 to 1: it is held out below the held-out fraction."""
    characters: int
    tokens: int = 0

    def amount(self, unit: Unit) -> int:
        return 1 if unit == "rows" else self.characters if unit == "characters" else self.tokens


@dataclass
class SourceRows:
    """A source's rows on both sides, and what of them is trained on."""

    name: str
    path: Path
    rows: list[SourceRow]
    is_heldout: bool = False
    """Whether it is held out whole."""
    heldout: list[SourceRow] = field(default_factory=list)
    training: list[SourceRow] = field(default_factory=list)
    planned: int | None = None
    """What the weights or the budgets ask of it, in their unit. None: every row once."""
    drawn: list[tuple[int, SourceRow]] = field(default_factory=list)
    """(how often the row was drawn before, row)."""


def split(sources: list[SourceRows], fraction: float, most: int | None, ledger: Ledger) -> None:
    """Sets each source's held-out and training rows, so that no text and no prompt is on both sides."""
    contents: set[bytes] = set()
    shared: set[bytes] = set()
    for source in sources:
        repeated: list[SourceRow] = []
        for row in source.rows:
            if source.is_heldout or row.rank < fraction:
                (repeated if row.content in contents else source.heldout).append(row)
                contents.add(row.content)
                shared.add(row.shared)
        drop(ledger, "held_out_twice", source, repeated)
    for source in (each for each in sources if not each.is_heldout):
        leaking: list[SourceRow] = []
        for row in source.rows:
            if row.rank >= fraction:
                leaks = row.content in contents or row.shared in shared
                (leaking if leaks else source.training).append(row)
        drop(ledger, "also_held_out", source, leaking)
    limit_heldout(sources, most, ledger)


def limit_heldout(sources: list[SourceRows], most: int | None, ledger: Ledger) -> None:
    """Leaves the rows with the smallest hash; which those are depends on no other row."""
    if most is None:
        return
    ordered = sorted((row for source in sources for row in source.heldout), key=lambda row: (row.rank, row.content))
    kept = {id(row) for row in ordered[:most]}
    for source in sources:
        drop(ledger, "over_max_heldout_rows", source, [row for row in source.heldout if id(row) not in kept])
        source.heldout = [row for row in source.heldout if id(row) in kept]


def drop(ledger: Ledger, reason: str, source: SourceRows, rows: list[SourceRow]) -> None:
    """Counts rows as dropped, with the beginning of the first as the example."""
    if not rows:
        return
    with source.path.open("rb") as file:
        file.seek(rows[0].offset)
        row = json.loads(file.readline())
    text = judged_text(row, format_of_row(row))
    ledger.drop(reason, f"{source.name}: {text}", count=len(rows))


def amounts_by_weight(
    weights: Mapping[str, float], available: Mapping[str, int], on_exhausted: str, repeats: int
) -> dict[str, int]:
    """Source -> amount, in exact proportion to the weights.

    With a_i available and weight w_i (summing to 1) the total is min(a_i / w_i) if no row may be used twice, and else
    max(a_i / w_i), but no more than repeats x min(a_i / w_i).
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    whole = sum(exact.values())
    until_used_up = {name: available[name] / (exact[name] / whole) for name in weights}
    total = min(until_used_up.values())
    if on_exhausted == "repeat":
        total = min(max(until_used_up.values()), repeats * total)
    planned = {name: int(total * exact[name] / whole) for name in weights}
    if nothing := [name for name, amount in planned.items() if amount == 0]:
        hint = "Raise its weight, or leave it out of the inputs."
        raise DataError(Problem(f"params.weights.{nothing[0]}", "is so small that no row of the source is used", hint))
    return planned


def refuse_small_sources(budgets: Mapping[str, int], available: Mapping[str, int], repeats: int, unit: Unit) -> None:
    """Raises `DataError` for every source that its budget asks more of than it may give."""
    problems = [
        Problem(
            f"params.budgets.{name}",
            f"asks for {budget:,} {unit}, and the source has {available[name]:,}"
            + (f", which may be used {repeats} times" if repeats > 1 else ""),
            "Lower the budget, or raise max_repeats."
            if repeats > 1
            else "Lower the budget, or set `on_exhausted: repeat`.",
        )
        for name, budget in budgets.items()
        if budget > available[name] * repeats
    ]
    if problems:
        raise DataError(*problems)


def draw(source: SourceRows, unit: Unit, seed: int) -> None:
    """Draws rows until the planned amount is reached, all of them once before any a second time.

    Their order is that of a hash, so it depends on nothing but the seed and the rows: neither on a library's random
    numbers nor on the other sources.
    """
    if source.planned is None:
        source.drawn = [(0, row) for row in source.training]
        return
    amount = 0
    for times in count():
        for row in sorted(source.training, key=lambda row: order_key(seed, source.name, times, row)):
            if amount >= source.planned:
                return
            source.drawn.append((times, row))
            amount += row.amount(unit)


def order_key(seed: int, name: str, times: int, row: SourceRow, purpose: str = "draw") -> tuple[bytes, int]:
    key = f"{purpose}\0{seed}\0{name}\0{times}\0".encode() + row.content
    return hashlib.sha256(key).digest()[:16], row.offset


def training_order(sources: list[SourceRows], seed: int) -> Iterator[tuple[SourceRows, SourceRow]]:
    """The drawn rows of all sources, shuffled by the seed."""
    drawn = [
        (order_key(seed, source.name, times, row, "shuffle"), index, row)
        for index, source in enumerate(sources)
        for times, row in source.drawn
    ]
    drawn.sort(key=lambda item: item[:2])
    return ((sources[index], row) for _, index, row in drawn)


def heldout_order(sources: list[SourceRows]) -> Iterator[tuple[SourceRows, SourceRow]]:
    """The held-out rows of all sources by their hash: the same whatever the seed and the weights."""
    pairs = [(source, row) for source in sources for row in source.heldout]
    return iter(sorted(pairs, key=lambda pair: (pair[1].rank, pair[1].content)))
