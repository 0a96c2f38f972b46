"""What every stage owes: a name, documented params with valid defaults, sound inputs, and a recipe that uses it."""

from __future__ import annotations

import ast
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from launch import LAUNCHERS
from pipeline.recipe.reader import load_recipe
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT, OutsidePath, Strict, documentation, models_in
from pipeline.stage import Input, Stage
from pipeline.store.artifact import Kind
from stages import STAGES

RECIPES = sorted((CHECKOUT / "pipeline" / "recipes").glob("**/*.yaml"))
GROUPS = sorted(
    path.name for path in (CHECKOUT / "stages").iterdir() if path.is_dir() and path.name not in ("lib", "__pycache__")
)


def file_of(stage: Stage) -> Path:
    """The file that holds the stage's `run`."""
    return Path(importlib.import_module(stage.run.__module__).__file__ or "").resolve()


def all_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The model and every model that stands in its fields, at any depth."""
    found = [model]
    for candidate in found:
        for field in candidate.model_fields.values():
            found += [inner for inner in models_in(field.annotation) if inner not in found]
    return found


def all_fields(stage: Stage) -> list[tuple[str, FieldInfo]]:
    return [
        (f"{model.__name__}.{name}", field)
        for model in all_models(stage.params)
        for name, field in model.model_fields.items()
    ]


each_stage = pytest.mark.parametrize("kind", STAGES)


@each_stage
def test_the_table_the_stage_and_its_file_have_one_name(kind: str) -> None:
    stage = STAGES[kind]
    assert stage.kind == kind
    path = file_of(stage)
    assert path.stem == kind
    assert path.parent.parent == CHECKOUT / "stages"
    assert importlib.import_module(f"stages.{path.parent.name}.{kind}").STAGE is stage


def test_every_stage_file_is_in_the_table() -> None:
    files = {path.stem for group in GROUPS for path in (CHECKOUT / "stages" / group).glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


@each_stage
def test_stage_files_read_in_one_order(kind: str) -> None:
    """Params; what `plan` asks; `run`; `STAGE`; helpers. Python wants each function that STAGE names to stand above it."""
    if kind in OWN_ORDER:
        return
    places = [(place, name) for place, name in places_in(file_of(STAGES[kind])) if place is not None]
    assert [name for _, name in places] == [name for _, name in sorted(places, key=lambda each: each[0])]
    assert {place for place, _ in places} >= {0, 2, 3}


OWN_ORDER = {"tokenizer"}
"""Stages whose file is not brought into the order yet."""


def places_in(path: Path) -> Iterator[tuple[int | None, str]]:
    """(place in the order, name) of everything at the top of a stage file; None for constants and imports."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    (declared,) = [
        node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STAGE"
    ]
    assert isinstance(declared, ast.Call)
    named = {word.arg: ast.unparse(word.value) for word in declared.keywords}
    asked = {named.get(word) for word in ("output", "estimate", "check")}
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield (0 if node.name.endswith("Params") else 4), node.name
        elif isinstance(node, ast.FunctionDef):
            yield {**dict.fromkeys(asked, 1), named["run"]: 2}.get(node.name, 4), node.name
        else:
            yield (3 if isinstance(node, ast.Assign) and node.value is declared else None), ast.unparse(node)


@each_stage
def test_the_stage_says_in_a_line_what_it_makes(kind: str) -> None:
    stage = STAGES[kind]
    assert stage.version >= 1
    assert 10 <= len(stage.summary) <= 120
    assert "\n" not in stage.summary


@each_stage
def test_every_field_is_documented_with_a_sentence(kind: str) -> None:
    """The string literal under a field is what `slipway stages` prints and what error messages quote."""
    assert [name for model in all_models(STAGES[kind].params) for name in undocumented(model)] == []


def undocumented(model: type[BaseModel]) -> list[str]:
    """The fields whose documentation is missing or no sentence."""
    texts = documentation(model)
    return [
        f"{model.__name__}.{name}: {texts.get(name)!r}"
        for name in model.model_fields
        if not re.fullmatch(r"\S.{8,}[.?]", texts.get(name, ""))
    ]


@each_stage
def test_every_default_is_valid(kind: str) -> None:
    """A default that its own bounds refuse could not be written into a recipe."""
    wrong = []
    for model in all_models(STAGES[kind].params):
        for name, field in model.model_fields.items():
            if field.is_required():
                continue
            default = field.get_default(call_default_factory=True, validated_data={})
            if isinstance(default, BaseModel) or default is None:
                continue
            adapter: TypeAdapter[Any] = TypeAdapter(typing.Annotated[field.annotation, field])
            try:
                adapter.validate_python(default, strict=True)
            except ValueError as error:
                wrong.append(f"{model.__name__}.{name}: {error}")
    assert wrong == []


@each_stage
def test_every_model_is_strict(kind: str) -> None:
    """Unknown fields are refused at every depth."""
    assert [model.__name__ for model in all_models(STAGES[kind].params) if not issubclass(model, Strict)] == []


@each_stage
def test_fields_hold_what_yaml_can_say(kind: str) -> None:
    """In strict mode a tuple, a set or an enum could not be written in a recipe."""
    plain = {bool, int, float, str, type(None), Any, Path}
    wrong = [
        f"{name}: {leaf}"
        for name, field in all_fields(STAGES[kind])
        for leaf in leaves_of(field.annotation)
        if leaf not in plain and not (isinstance(leaf, type) and issubclass(leaf, BaseModel))
    ]
    assert wrong == []


def leaves_of(annotation: Any) -> list[Any]:
    """The types at the ends of an annotation, with lists, mappings, unions, literals and metadata taken apart."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return [type(value) for value in typing.get_args(annotation)]
    if origin is typing.Annotated:
        return leaves_of(typing.get_args(annotation)[0])
    if origin in (list, dict) or origin is typing.Union or type(annotation).__name__ == "UnionType":
        return [leaf for part in typing.get_args(annotation) for leaf in leaves_of(part)]
    return [annotation]


def test_a_bare_path_is_no_outside_path() -> None:
    """A field that names a file must be an `OutsidePath`, so that the file's content is part of the identity."""
    marks = {type(mark) for mark in typing.get_args(OutsidePath)[1:]}
    bare = [
        f"{kind}: {name}"
        for kind, stage in STAGES.items()
        for name, field in all_fields(stage)
        if Path in leaves_of(field.annotation)
        and "AfterValidator" not in str(field)
        and not marks & set(map(type, field.metadata))
    ]
    assert bare == []


@each_stage
def test_inputs_and_output_are_kinds(kind: str) -> None:
    stage = STAGES[kind]
    for role, declared in stage.inputs.items():
        assert role.isidentifier(), role
        assert isinstance(declared, Input)
        assert declared.kinds, f"{role} accepts nothing"
        assert all(isinstance(accepted, Kind) for accepted in declared.kinds)
    assert isinstance(stage.output, Kind) or callable(stage.output)


@each_stage
def test_headline_metrics_are_named_once(kind: str) -> None:
    headline = STAGES[kind].headline
    assert len(set(headline)) == len(headline)
    assert all(name == name.lower() and " " not in name for name in headline)


def test_every_stage_appears_in_a_recipe() -> None:
    used = {step.stage.kind for path in RECIPES for step in load_recipe(path, STAGES, LAUNCHERS).steps}
    assert set(STAGES) - used == set()


def test_resources_are_documented_too() -> None:
    assert undocumented(Resources) == []
