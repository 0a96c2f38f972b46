"""A DeepSpeed config against the tables of its fields: what is wrong with it, and what of it is handed to DeepSpeed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import MOST_PROBLEMS, Problem, did_you_mean, shown
from stages.lib.training.layout_fields import (
    BLOCKS,
    FIELDS,
    FITTED,
    KEPT,
    MATCHED,
    NOTHING,
    PACKAGES,
    REFUSED,
    SET,
    ZERO,
)

WHERE = "resources.deepspeed"


def says_nothing(value: Any) -> bool:
    """Whether a value leaves DeepSpeed as it is without it: off, empty, or left to the recipe."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left += [] if each.get("enabled") is False else each.values()
        elif not (each is None or each is False or each in ("auto", [])):
            return False
    return True


def switched_off(field: str, value: Any) -> bool:
    """Whether a refused field has a value that does nothing, as files that list all defaults have it."""
    default = REFUSED[field].default
    if default is NOTHING:
        return says_nothing(value)
    same = value == default and isinstance(value, bool) == isinstance(default, bool)
    return same or value is None or value == "auto"


def walk(block: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of a config: of blocks that are looked into their fields, of all else the whole."""
    for name, value in block.items():
        field = f"{parent}{name}"
        if field in BLOCKS and isinstance(value, Mapping):
            yield from walk(value, f"{field}.")
        else:
            yield field, value


def field_problems(layout: Mapping[str, Any]) -> list[Problem]:
    """What in a DeepSpeed config is no memory layout, is not known, or has a value that it cannot have."""
    found = (field_problem(field, value) for field, value in walk(layout))
    problems = list(itertools.islice((problem for problem in found if problem is not None), MOST_PROBLEMS))
    for block, package in PACKAGES.items():
        on = isinstance(layout.get(block), Mapping) and layout[block].get("enabled") is True
        if on and importlib.util.find_spec(package) is None:
            what = f"its {block} is enabled, and the package {package} is not installed"
            problems.append(Problem(WHERE, what, "Install it, or remove the block from the file."))
    return problems


def field_problem(field: str, value: Any) -> Problem | None:
    if field in SET or field in MATCHED or field == f"{ZERO}.stage":
        return None
    if field in REFUSED:
        refused = REFUSED[field]
        what = f"its {'block ' if isinstance(value, Mapping) else ''}'{field}' {refused.why}"
        return None if switched_off(field, value) else Problem(WHERE, what, refused.hint)
    if field in BLOCKS:
        what = f"its {field} is {shown(value)}, and not a mapping"
        return None if value is None else Problem(WHERE, what, "Compare with ds_configs/zero3_offload.json.")
    if field in KEPT:
        values = KEPT[field]
        fits = value is None or value == "auto" or values.fit(value)
        return None if fits else Problem(WHERE, f"its {field} is {shown(value)}", f"Write {values.words}.")
    return unknown(field)


def unknown(field: str) -> Problem:
    what = f"its '{shown(field, quoted=False)}' is no field of a memory layout, and none that DeepSpeed reads there"
    parent, _, name = field.rpartition(".")
    places = sorted(each for each in FIELDS | BLOCKS if each.rpartition(".")[2] == name)
    if len(places) == 1:
        return Problem(WHERE, what, f"Write it as {places[0]}, or remove it.")
    beside = f"{parent}." if parent else ""
    siblings = {each.removeprefix(beside) for each in FIELDS | BLOCKS if each.startswith(beside)}
    hint = did_you_mean(name, sorted(each for each in siblings if "." not in each))
    hint = f"{hint} Else remove it." if hint.startswith("Did you mean") else "Remove it from the file."
    return Problem(WHERE, what, hint)


def without_what_is_off(block: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """The config without what says nothing: DeepSpeed refuses some of its old fields even where they are off."""
    kept: dict[str, Any] = {}
    for name, value in block.items():
        field = f"{parent}{name}"
        if value is None or field in REFUSED or field in MATCHED or (value == "auto" and field not in FITTED):
            continue
        looked_into = field in BLOCKS and isinstance(value, Mapping)
        kept[name] = without_what_is_off(value, f"{field}.") if looked_into else value
    return kept
