"""What to do: a recipe, checked and with everything resolved. `reader.py` makes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, RecipeError, did_you_mean, shown
from pipeline.recipe.graph import needed_for
from pipeline.settings.resources import Resources
from pipeline.settings.strict import Strict
from pipeline.stage import Stage
from pipeline.store.artifact import Kind

__all__ = ["HUB", "Hub", "Outside", "Recipe", "RecipeStep", "Resources", "Source", "Upstream"]


HUB = "hub:"


NAME = "^[a-z0-9][a-z0-9_-]{0,63}$"
"""What recipes, stages and the names in roles that take several are called. Folders and files carry these names."""


NAME_RULE = "lower-case letters, digits, - and _, at most 64, the first a letter or a digit"


REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
"""What a repository of the hub can be called."""


@dataclass(frozen=True)
class Upstream:
    """An input that another step of the recipe makes."""

    step: str


@dataclass(frozen=True)
class Outside:
    """An input from outside the recipe: an artifact of any store, or a model or tokenizer folder."""

    path: Path
    kind: Kind
    artifact_id: str | None = None

    @property
    def lies_in_store(self) -> bool:
        """Whether the folder is where a store keeps an artifact: there nobody edits, and what differs is damage."""
        return self.path.parent.name == "artifacts" and re.fullmatch(r"[0-9a-f]{64}", self.path.name) is not None


@dataclass(frozen=True)
class Hub:
    """An input from the hub, at exactly one revision."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{HUB}{self.repository}@{self.revision}"


Source = Upstream | Outside | Hub


def upstream_of(inputs: Mapping[str, Source]) -> list[str]:
    """The steps of the recipe among the inputs, as often as they stand there."""
    return [source.step for source in inputs.values() if isinstance(source, Upstream)]


@dataclass(frozen=True)
class RecipeStep:
    """One stage of a recipe with everything resolved."""

    name: str
    stage: Stage
    params: Strict
    inputs: Mapping[str, Source]
    output_kind: Kind
    resources: Resources
    seed: int

    @property
    def upstream(self) -> list[str]:
        return upstream_of(self.inputs)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its steps in an order in which each stands after its inputs."""

    path: Path
    name: str
    overrides: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[RecipeStep, ...]

    def step(self, name: str) -> RecipeStep:
        for step in self.steps:
            if step.name == name:
                return step
        hint = did_you_mean(name, [step.name for step in self.steps])
        raise RecipeError(Problem(str(self.path), f"has no stage '{shown(name, quoted=False)}'", hint))

    def needed_for(self, name: str) -> set[str]:
        """The step itself and everything it stands on."""
        return needed_for([self.step(name).name], {step.name: step.upstream for step in self.steps})
