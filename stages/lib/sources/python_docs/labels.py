"""Classification: which top-level package a function is from, told by its source alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import Function, Module, choice

NUM_LABELS = 10
MOST_ROWS_PER_LABEL = 250
MOST_ROWS_PER_MODULE = 60
FEWEST_MODULES = 3
"""Whole modules are held out: a label of one or two could lose most of its rows to one side."""
LONGEST_TEXT_CHARACTERS = 500
FEWEST_TEXT_CHARACTERS = 120


def label_rows(modules: Iterable[Module]) -> Iterator[Row]:
    """Label rows of the packages with the most functions, balanced by a cap per module and one per package.

    Functions whose excerpt names their package are left out: they would give the answer away.
    """
    by_package: dict[str, list[Row]] = defaultdict(list)
    for module in modules:
        rows = [row for function in module.functions if (row := label_row(function, module.package))]
        for row in picked(rows, MOST_ROWS_PER_MODULE):
            by_package[module.package].append({**row, "group": module.name})
    num_modules = {package: len(Counter(row["group"] for row in rows)) for package, rows in by_package.items()}
    large = [package for package in by_package if num_modules[package] >= FEWEST_MODULES]
    for package in sorted(large, key=lambda package: (-len(by_package[package]), package))[:NUM_LABELS]:
        yield from picked(by_package[package], MOST_ROWS_PER_LABEL)


def label_row(function: Function, package: str) -> Row | None:
    text = function.excerpt(LONGEST_TEXT_CHARACTERS).text
    if len(text) < FEWEST_TEXT_CHARACTERS or package.lower() in text.lower():
        return None
    return {"id": f"{function.name}#label", "text": text, "label": package}


def picked(rows: list[Row], most: int) -> list[Row]:
    """At most `most` of the rows, chosen by the hash of their ids, in their old order."""
    chosen = {row["id"] for row in sorted(rows, key=lambda row: choice(row["id"], 2**64))[:most]}
    return [row for row in rows if row["id"] in chosen]
