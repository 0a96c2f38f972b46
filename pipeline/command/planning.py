"""What several commands begin and end with: a recipe planned with the tables of stages, launchers and trackers, and lines printed."""

from __future__ import annotations

import sys
from pathlib import Path

from launch import LAUNCHERS
from pipeline.errors import Problem, RecipeError
from pipeline.recipe.reader import load_recipe
from pipeline.running.plan import Plan, make_plan
from pipeline.store.store import Store
from stages import STAGES
from trackers import TRACKERS


def planned(
    recipe: Path,
    overrides: list[str] | None,
    store: Store,
    *,
    only: str | None = None,
    until: str | None = None,
    verify: bool = False,
) -> Plan:
    """The plan of the recipe, of all steps or of those chosen. Raises `RecipeError` where both ways to choose are taken."""
    if only is not None and until is not None:
        raise RecipeError(Problem("--only and --until", "exclude each other", "Use one of them."))
    the_recipe = load_recipe(recipe, STAGES, LAUNCHERS, overrides or (), TRACKERS)
    return make_plan(the_recipe, store, only=only, until=until, verify=verify)


def print_notes(notes: list[str]) -> None:
    """What is odd and does not hinder: beside the output, which may be for programs."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)
