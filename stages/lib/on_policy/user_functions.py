"""A function in a Python file of the user's: found and read without running anything. Imports no torch."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import did_you_mean, shown


@dataclass(frozen=True)
class Parameters:
    """What a function asks for, by name."""

    names: tuple[str, ...]
    optional: frozenset[str]
    """Those with a default: they may be missing in a row."""
    takes_all: bool
    """Whether it has `**names`, and so is given every column."""


def text_of_program(path: Path) -> str:
    """What a Python file says. Raises `ValueError` if that is no text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start}") from None


def parameters_of(source: str, function: str, path: str) -> Parameters:
    """What the function asks for. Raises `ValueError` if the file holds no such function, or is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            body = ast.parse(source, filename=path).body
    except SyntaxError as error:
        place = f"{path}, line {error.lineno}" if error.lineno else path
        raise ValueError(f"{place}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is no Python that can be read: {error}") from None
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if function not in found:
        known = did_you_mean(function, found) or "it has none"
        raise ValueError(f"function: {path} has no `def {shown(function, quoted=False)}` at its top level ({known})")
    node = found[function]
    if isinstance(node, ast.AsyncFunctionDef):
        raise ValueError(f"function: {function} is an `async def`: write a `def` that waits itself")
    if node.args.posonlyargs:
        names = ", ".join(each.arg for each in node.args.posonlyargs)
        raise ValueError(
            f"function: {function} takes {names} by position only: remove the `/`, for all are given by name"
        )
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    optional = [each.arg for each in node.args.args[len(node.args.args) - len(node.args.defaults) :]]
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    optional += [each.arg for each, default in pairs if default is not None]
    return Parameters(tuple(names), frozenset(optional), node.args.kwarg is not None)


def arguments_for(parameters: Parameters, given: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call: what is `given`, and of the columns those that it asks for.

    Raises `KeyError` with the first parameter that is neither.
    """
    arguments = {name: given[name] for name in parameters.names if name in given}
    for name in parameters.names:
        if name in arguments or (name in parameters.optional and name not in columns):
            continue
        arguments[name] = columns[name]
    return {**columns, **arguments} if parameters.takes_all else arguments
