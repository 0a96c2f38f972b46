"""What readers of a recipe have in common: where they are, and the problems that gather."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import MOST_PROBLEMS, Problem, RecipeError
from pipeline.settings.strict import Reading, validate


@dataclass
class Checking:
    """Checks parts of one recipe; what is wrong gathers in `problems`, which several of these may share."""

    where: str
    folders: list[Path]
    problems: list[Problem]

    def context(self) -> Reading:
        return Reading(list(self.folders))

    def problem(self, where: str, what: str, hint: str = "") -> None:
        if len(self.problems) >= MOST_PROBLEMS:
            raise RecipeError(
                *unique(self.problems), Problem(self.where + where, what, f"{hint} More was not looked for.")
            )
        self.problems.append(Problem(self.where + where, what, hint))

    def check(self, model: type[Any], value: Any, where: str) -> Any:
        checked, problems = validate(model, value, self.where + where, self.context())
        self.problems += problems
        return checked


def unique(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
