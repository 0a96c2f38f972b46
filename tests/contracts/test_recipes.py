"""Every YAML file that comes along can be used as it is."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError, WrapValidator

from launch import LAUNCHERS
from pipeline.recipe.reader import load_recipe
from pipeline.running.plan import Action, make_plan
from pipeline.settings.strict import CHECKOUT, Reading, inline
from pipeline.settings.yaml_loader import load_yaml, parse_yaml
from pipeline.store.store import Store
from stages import STAGES

RECIPES = sorted((CHECKOUT / "pipeline" / "recipes").glob("**/*.yaml"))
BLOCKS = sorted((CHECKOUT / "data_recipes").glob("**/*.yaml"))
DOCUMENTS = sorted([*(CHECKOUT / "data_recipes").glob("**/*.md"), *(CHECKOUT / "pipeline").glob("**/*.md")])


def relative(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}
    assert BLOCKS


def test_no_yaml_hides_under_another_ending() -> None:
    """A loop over `*.yaml` would pass it by."""
    folders = [CHECKOUT / "pipeline", CHECKOUT / "data_recipes"]
    assert [relative(path) for folder in folders for path in folder.glob("**/*.yml")] == []


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_loads_and_plans(path: Path, tmp_path: Path) -> None:
    """In an empty store every step is to run, and nothing is created."""
    store = Store(tmp_path / "runs")
    recipe = load_recipe(path, STAGES, LAUNCHERS)
    plan = make_plan(recipe, store)
    assert recipe.name == path.stem
    assert {step.action for step in plan.steps} == {Action.RUN}
    assert not store.folder.exists()


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_says_what_it_is_for(path: Path) -> None:
    """In its first line, for who looks into the folder."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("path", BLOCKS, ids=relative)
def test_a_data_recipe_is_a_block_of_some_stage(path: Path) -> None:
    """It validates as one of the blocks that a stage's params let stand in a file of its own."""
    _, duplicates = load_yaml(path)
    assert duplicates == []
    refusals = []
    for name, annotation in block_fields():
        try:
            TypeAdapter(annotation).validate_python(str(path), strict=True, context=Reading([path.parent]))
            return
        except (ValidationError, ValueError) as error:
            refusals.append(f"{name}: {error}")
    pytest.fail(f"{relative(path)} is none of the blocks that stages take:\n" + "\n".join(refusals))


def block_fields() -> Iterator[tuple[str, Any]]:
    """(stage.param, its annotation) of every param that may be the path of a YAML file."""
    for kind, stage in STAGES.items():
        for name, field in stage.params.model_fields.items():
            annotation = typing.Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            if takes_a_file(annotation):
                yield f"{kind}.{name}", annotation


def takes_a_file(annotation: Any) -> bool:
    if isinstance(annotation, WrapValidator):
        return annotation.func is inline
    return any(takes_a_file(part) for part in typing.get_args(annotation))


def test_some_params_take_a_file() -> None:
    """Or the test above would look at nothing."""
    assert "clean.source" in dict(block_fields())


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_yaml_in_a_readme_is_yaml(path: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        document, problems = parse_yaml(inspect.cleandoc(block), relative(path))
        assert problems == []
        assert document is not None
