"""The base of every params model: unknown fields are errors, nothing is converted, and files are named by content.

Models are validated in pydantic's strict mode on plain YAML values, so a field is one of: `bool`, `int`, `float`,
`str`, `Literal`, `list`, `dict`, another `Strict`, `OutsidePath`, or `Inlined[Model]`. Each field is documented by the
string literal under it; `slipway stages` prints that.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, PydanticSerializationError

from pipeline.errors import MOST_PROBLEMS, PathError, Problem, RecipeError, did_you_mean, shown, shown_path
from pipeline.settings.paths import expanded, kind_of_file, matching, status
from pipeline.settings.yaml_loader import load_yaml

# Else pydantic looks for plugins in the metadata of every installed package before it builds the first model, which `plan`
# cannot wait for. Ours need none; whoever wants one sets the variable, which stays as it is.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


CHECKOUT = Path(__file__).resolve().parents[2]
"""The root of the source checkout: paths in recipes are looked up against the file that names them, then here."""


class Strict(BaseModel):
    """A frozen model that refuses unknown fields and numbers that are not finite, and converts nothing."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )


@dataclass
class Reading:
    """Validation context: where relative paths start, innermost file first, and what else was found wrong."""

    folders: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def find(self, name: str) -> Path | None:
        """The existing file or folder that `name` means, or None. Raises `PathError` if it means something else."""
        path = expanded(name)
        for folder in [*self.folders, CHECKOUT]:
            found = status(folder / path)
            if found is None:
                continue
            if other := kind_of_file(found):
                raise PathError(Problem(name, f"is {other}, and a file or folder is needed", "Name another."))
            # The name that links lead to is written down too, so it must be text as well.
            return expanded((folder / path).resolve())
        return None

    def find_file(self, name: str) -> Path | None:
        """As `find`, and raises `PathError` for a folder too."""
        found = self.find(name)
        if found is not None and found.is_dir():
            raise PathError(Problem(name, "is a folder, and a file is needed", "Name the file in it."))
        return found

    def missing(self, name: str) -> PydanticCustomError:
        places = " and ".join(str(folder) for folder in dict.fromkeys([*self.folders, CHECKOUT]))
        looked = "" if expanded(name).is_absolute() else f" (looked below {places})"
        return PydanticCustomError(
            "missing_file",
            "no such file or folder: {name}{looked}",
            {"name": shown_path(name), "looked": looked},
        )


def reading(info: ValidationInfo) -> Reading:
    return info.context if isinstance(info.context, Reading) else Reading([Path.cwd()])


def resolve_outside_path(path: Path, info: ValidationInfo) -> Path:
    context = reading(info)
    found = context.find(str(path))
    if found is None:
        raise context.missing(str(path))
    return found


def name_by_content(path: Path, info: SerializationInfo) -> str:
    """The path itself, or in an identity (where the context is a digest function) the digest of what it holds."""
    return info.context(path) if callable(info.context) else str(path)


def content_of(params: Strict, digest: Callable[[Path], str]) -> dict[str, Any]:
    """The params as plain values, with `digest(path)` where they name files: what decides the result.

    Raises what `digest` raises.
    """
    try:
        return params.model_dump(mode="json", context=digest)
    except PydanticSerializationError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


OutsidePath = Annotated[
    Path, Field(strict=False), AfterValidator(resolve_outside_path), PlainSerializer(name_by_content, return_type=str)
]
"""A file or folder that is no artifact. It must exist; in identities its content's digest stands for it."""


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise PathError(Problem(str(path), "is a folder, and a file is needed", "Name the file in it."))
    return path


def require_folder(path: Path) -> Path:
    if not path.is_dir():
        raise PathError(Problem(str(path), "is a file, and a folder is needed", "Name the folder that it stands in."))
    return path


OutsideFile = Annotated[OutsidePath, AfterValidator(require_file)]
OutsideFolder = Annotated[OutsidePath, AfterValidator(require_folder)]


def expand_globs(patterns: list[str], info: ValidationInfo) -> list[str]:
    """Absolute paths of the files that the patterns match, sorted per pattern; a pattern without match is an error."""
    context = reading(info)
    paths = []
    for pattern in patterns:
        if not has_magic(pattern):
            paths.append(pattern)
            continue
        for folder in [*context.folders, CHECKOUT]:
            if matches := matching(folder / expanded(pattern)):
                paths += matches
                break
        else:
            raise context.missing(pattern)
    return paths


def inline(value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """A block written in place, or the path of a YAML file that holds it."""
    if not isinstance(value, str):
        return handler(value)
    context = reading(info)
    path = context.find_file(value)
    if path is None:
        raise context.missing(value)
    try:
        block, problems = load_yaml(path)
    except RecipeError as error:
        context.problems += [problem for problem in error.problems if isinstance(problem, Problem)]
        raise PydanticCustomError(REPORTED, "the file's own problems say it") from None
    context.problems += problems
    context.folders.insert(0, path.parent)
    try:
        return handler(block)
    finally:
        context.folders.pop(0)


REPORTED = "reported"
"""The type of an error whose sentences stand in `Reading.problems`."""


Block = TypeVar("Block", bound=BaseModel)


Inlined = Annotated[Block, WrapValidator(inline)]
"""`Inlined[Model]`: the block itself, or a path to a YAML file with it. The content, not the path, is what counts."""


def validate(
    model: type[Block], value: Any, where: str, context: Reading | None = None
) -> tuple[Block | None, list[Problem]]:
    """`value` as a `model`, or None, and everything that is wrong with it."""
    context = context or Reading([Path.cwd()])
    context.problems = []
    if not isinstance(value, Mapping):
        return None, [Problem(where, f"must be a mapping of fields, not {shown(value)}", "Write `field: value` lines.")]
    try:
        return model.model_validate(value, context=context), context.problems
    except ValidationError as error:
        return None, context.problems + list(problems_of(error, model, where))
    except RecipeError as error:
        return None, context.problems + [p if isinstance(p, Problem) else Problem(where, p) for p in error.problems]


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping of fields",
}


def problems_of(error: ValidationError, model: type[BaseModel], where: str) -> Iterator[Problem]:
    """Pydantic's errors in the words of a recipe's author."""
    for item in error.errors(include_url=False)[:MOST_PROBLEMS]:
        loc = [str(part) for part in item["loc"]]
        path = ".".join([where, *loc]) if where else ".".join(loc)
        kind, given = item["type"], item["input"]
        if kind == REPORTED:
            continue
        if kind == "extra_forbidden":
            yield Problem(path, "unknown field", did_you_mean(loc[-1], field_names(model, loc[:-1])))
        elif kind == "missing":
            yield Problem(path, "is required", description_of(model, loc))
        elif kind.removesuffix("_type") in EXPECTED and kind.endswith("_type"):
            expected = EXPECTED[kind.removesuffix("_type")]
            hint = (
                "Remove the quotes." if isinstance(given, str) and looks_like_a_number(given) else f"Write {expected}."
            )
            yield Problem(path, f"must be {expected}, not the {type_name(given)} {shown(given)}", hint)
        elif kind == "literal_error" and isinstance(given, str):
            nearest = did_you_mean(given, re.findall("'([^']*)'", item["ctx"]["expected"]))
            hint = nearest if nearest.startswith("Did") else description_of(model, loc)
            yield Problem(path, f"input should be {item['ctx']['expected']}, not {shown(given)}", hint)
        elif kind == "missing_file":
            yield Problem(path, item["msg"], "Correct the path.")
        elif kind == "value_error":
            yield Problem(path, str(item["ctx"]["error"]))
        else:
            yield Problem(
                path, f"{item['msg'][:1].lower()}{item['msg'][1:]}, not {shown(given)}", description_of(model, loc)
            )


def looks_like_a_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def type_name(value: Any) -> str:
    names = {str: "string", int: "whole number", float: "number", bool: "truth value", list: "list", dict: "mapping"}
    return names.get(type(value), "value")


def models_at(model: type[BaseModel], loc: Sequence[str]) -> list[type[BaseModel]]:
    """The models that may stand at `loc` below `model`."""
    models = [model]
    for part in loc:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        inner = [found for annotation in annotations for found in models_in(annotation)]
        # In a union of models, pydantic names the one that was meant by its `kind`.
        tagged = [m for m in models if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)]
        models = inner or tagged or models
    return models


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def field_names(model: type[BaseModel], loc: Sequence[str]) -> list[str]:
    return sorted({name for found in models_at(model, loc) for name in found.model_fields})


def description_of(model: type[BaseModel], loc: Sequence[str]) -> str:
    """The first sentence of the field's documentation."""
    for found in models_at(model, loc[:-1]):
        if loc and (text := documentation(found).get(loc[-1])):
            return text.split(". ")[0].rstrip(".") + "."
    return ""


@functools.cache
def documentation(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the string literal under it in the model or in what it derives from, on one line.

    Read from the source when asked: pydantic's own way reads it whenever a module is imported, which `plan` cannot wait for.
    """
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base in (BaseModel, object) or not issubclass(base, BaseModel):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field_line, literal in itertools.pairwise(definition.body):
            match field_line, literal:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return {name: found[name] for name in model.model_fields if name in found}
