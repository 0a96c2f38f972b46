"""YAML as version 1.2 reads it: `2e-5` is a number, `1:30` and `no` are strings, equal keys are an error.

PyYAML follows version 1.1, where `2e-5` is a string, `1:30` is 90 and the last of two equal keys wins in silence.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import Problem, RecipeError

Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(Base):  # type: ignore[misc]
    """Collects equal keys in `duplicates` and goes on with the first of them."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.duplicates: list[tuple[str, int, int]] = []
        self.odd_keys: list[tuple[Any, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        self.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.odd_keys.append((key, line))
                key = str(key)
            if key in mapping:
                self.duplicates.append((key, lines[key], line))
            else:
                mapping[key] = self.construct_object(value_node, deep=deep)
                lines[key] = line
        return mapping


Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True))


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


def construct_int(loader: Any, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


Loader.add_constructor("tag:yaml.org,2002:int", construct_int)


def parse_yaml(text: str | bytes, where: str) -> tuple[Any, list[Problem]]:
    """The document, and what is wrong with it that does not keep it from being read.

    Raises `RecipeError` where it is not YAML at all.
    """
    try:
        loader = Loader(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(Problem(where, f"is not text: {error}", "Save the file as UTF-8.")) from None
    try:
        document = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(Problem(f"{where}:{line}", f"is not YAML: {error.problem}", "Mend the line.")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(Problem(where, f"is not YAML: {error}", "Mend the file.")) from None
    finally:
        loader.dispose()
    problems = [
        Problem(f"{where}:{again}", f"the key '{key}' stands here a second time (first on line {first})", "Remove one.")
        for key, first, again in loader.duplicates
    ]
    problems += [
        Problem(f"{where}:{line}", f"the key {key!r} is not a string", "Put it in quotes.")
        for key, line in loader.odd_keys
    ]
    return unshared(document), problems


def unshared(value: Any) -> Any:
    """The same tree, with a copy wherever an alias (`*name`) stands: an override of one place must not reach the others."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value


def load_yaml(path: Path) -> tuple[Any, list[Problem]]:
    """`parse_yaml` of a file. Raises `RecipeError` if it cannot be read."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecipeError(Problem(str(path), f"cannot be read: {error.strerror}", "Check the path.")) from None
    return parse_yaml(text, str(path))
