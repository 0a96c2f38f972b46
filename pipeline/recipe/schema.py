"""A recipe's file as it is written: the fields at its top, and those of a step."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.recipe.recipe import NAME
from pipeline.settings.strict import Strict

MOST_STAGES = 1000
"""Of a recipe. Looking up what each of many thousands stands on takes long, and no one reads such a plan."""


class StageSpec(Strict):
    """One entry below `stages:`."""

    kind: str
    """What the stage does: a name that `slipway stages` lists."""
    inputs: dict[str, Any] = {}
    """Role -> the name of another stage, a path (with a `/`), or `hub:owner/name@<40 hex revision>`."""
    params: dict[str, Any] = {}
    """What decides the result: `slipway stages KIND` lists the fields."""
    resources: dict[str, Any] = {}
    """Where it runs: overrides the recipe's `resources`, field by field."""
    seed: int | None = Field(default=None, ge=0)
    """Overrides the recipe's seed."""


class RecipeFile(Strict):
    """The top level of a recipe."""

    name: str = Field(pattern=NAME)
    """Lower-case letters, digits, `-` and `_`, at most 64 of them."""
    description: str = ""
    """A sentence for readers."""
    seed: int = Field(default=42, ge=0)
    """Seed of every stage that does not name its own."""
    outputs: list[str] = Field(min_length=1)
    """The stages whose artifacts the recipe is for. A stage that none of them needs is an error."""
    resources: dict[str, Any] = {}
    """Resources of every stage that can run in several processes. Those that run in one take `device`, `keep_failed_output` and how long they may take to stop from here."""
    tracking: dict[str, Any] = {}
    """Where every stage is shown while it runs: `{tensorboard: {}, wandb: {project: mine}, mlflow: {uri: ...}}`, one or several, each with its options. A step's `resources` may have a `tracking` of its own."""
    stages: dict[str, Any] = Field(min_length=1)
    """Name -> stage."""
