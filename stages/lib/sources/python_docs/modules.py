"""What the sources of a Python tree hold: modules, the functions and classes in them, and excerpts with exact offsets.

Everything is read with `ast`: nothing is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pipeline.errors import DataError, Problem, did_you_mean
from stages.lib.sources.python_docs.descriptions import description_of

SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib lib2to3 turtledemo ensurepip encodings pydoc_data site-packages dist-packages "
    "lib-dynload __pycache__ _vendor _vendored".split()
)
"""Tests, programs, vendored code, and generated tables (`encodings`, `pydoc_data`): little prose, many near-duplicates."""
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""Written when Python was built or installed: these differ from machine to machine."""
LONGEST_DEFAULT_CHARACTERS = 30

BLOCKS = ("body", "cases", "handlers", "orelse", "finalbody")
"""The fields of a statement that hold statements, in source order."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    name: str
    """Dotted: `json.encoder`, and `json` for the package's own file."""
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def functions(self) -> list[Function]:
        """Functions and methods, in order; of several with one name (getter and setter, if and else) the first."""
        found = (
            Function(self, name, node, owner)
            for name, node, owner in definitions(self.tree.body, self.name)
            if not isinstance(node, ast.ClassDef)
        )
        return first_of_each_name(found)

    @cached_property
    def classes(self) -> list[Class]:
        found = (
            Class(self, name, node)
            for name, node, _ in definitions(self.tree.body, self.name)
            if isinstance(node, ast.ClassDef)
        )
        return first_of_each_name(found)


@dataclass(frozen=True)
class Parameter:
    name: str
    mark: str
    """What stands before the name: ``, `*` or `**`."""
    default: ast.expr | None
    node: ast.arg

    @property
    def default_text(self) -> str | None:
        if self.default is None:
            return None
        text = ast.unparse(self.default)
        return text if len(text) <= LONGEST_DEFAULT_CHARACTERS else "..."


class Documented:
    """A function or a class, which may have a docstring."""

    node: FunctionNode | ast.ClassDef

    @cached_property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @cached_property
    def description(self) -> str:
        return description_of(self.docstring)


@dataclass(frozen=True)
class Function(Documented):
    module: Module
    name: str
    """Dotted, with module and class: `json.encoder.JSONEncoder.encode`."""
    node: FunctionNode
    owner: ast.ClassDef | None

    @cached_property
    def parameters(self) -> list[Parameter]:
        """All parameters but the instance or class that a method is bound to."""
        arguments = self.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
        pairs = list(zip(positional, defaults, strict=True))
        if self.is_bound:
            pairs = pairs[1:]
        found = [Parameter(node.arg, "", default, node) for node, default in pairs]
        if arguments.vararg:
            found.append(Parameter(arguments.vararg.arg, "*", None, arguments.vararg))
        for node, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            found.append(Parameter(node.arg, "", default, node))
        if arguments.kwarg:
            found.append(Parameter(arguments.kwarg.arg, "**", None, arguments.kwarg))
        return found

    @cached_property
    def decorators(self) -> list[str]:
        """Last names of the decorators: `property` for `@property`, `cached_property` for `@functools.cached_property`."""
        calls = [node.func if isinstance(node, ast.Call) else node for node in self.node.decorator_list]
        return [dotted_name(node).rpartition(".")[2] for node in calls]

    @property
    def is_bound(self) -> bool:
        return self.owner is not None and "staticmethod" not in self.decorators

    @property
    def is_property(self) -> bool:
        return any(decorator.endswith("property") for decorator in self.decorators)

    @property
    def call(self) -> str:
        """How a user writes it: dotted name and signature, or the name alone for a property."""
        return self.name if self.is_property else self.name + self.signature

    @cached_property
    def signature(self) -> str:
        """`(obj, *, indent=None)`: without annotations, long defaults as `...`."""
        arguments = self.node.args
        keyword_only = {node.arg for node in arguments.kwonlyargs}
        last_positional_only = arguments.posonlyargs[-1].arg if arguments.posonlyargs else None
        starred = arguments.vararg is not None
        parts = []
        for parameter in self.parameters:
            if parameter.name in keyword_only and not starred:
                parts.append("*")
                starred = True
            default = parameter.default_text
            parts.append(parameter.mark + parameter.name + ("" if default is None else f"={default}"))
            if parameter.name == last_positional_only:
                parts.append("/")
        return f"({', '.join(parts)})"

    @cached_property
    def statements(self) -> list[ast.AST]:
        """The statements of the body at any depth, in source order, without those of nested functions and classes."""
        return list(own_statements(self.node.body))

    def excerpt(self, most_characters: int) -> Excerpt:
        return Excerpt(self.module.lines, self.node, most_characters)


@dataclass(frozen=True)
class Class(Documented):
    module: Module
    name: str
    node: ast.ClassDef

    @property
    def functions(self) -> list[Function]:
        return [function for function in self.module.functions if function.owner is self.node]


class Excerpt:
    """A function's source from its `def` line on, dedented, cut at the end of a line."""

    def __init__(self, lines: list[str], node: FunctionNode, most_characters: int) -> None:
        self.first_line = node.lineno
        self.lines = lines[node.lineno - 1 : node.end_lineno]
        self.starts: list[int] = []
        self.removed: list[int] = []
        kept = []
        length = 0
        for line in self.lines:
            removed = min(node.col_offset, len(line) - len(line.lstrip(" \t")))
            if length + len(line) - removed > most_characters:
                break
            self.starts.append(length)
            self.removed.append(removed)
            kept.append(line[removed:])
            length += len(line) - removed + 1
        self.text = "\n".join(kept)
        self.is_whole = len(kept) == len(self.lines)

    def offset(self, line_number: int, column_bytes: int) -> int | None:
        """Characters from the start of `text`, or None outside of it. `ast` counts columns in UTF-8 bytes."""
        index = line_number - self.first_line
        if not 0 <= index < len(self.starts):
            return None
        line = self.lines[index]
        column = column_bytes if line.isascii() else len(line.encode()[:column_bytes].decode())
        return self.starts[index] + column - self.removed[index]

    def span(self, node: ast.expr) -> tuple[int, int] | None:
        """Half-open offsets of an expression, or None if the excerpt ends before it does."""
        if node.end_lineno is None or node.end_col_offset is None:
            return None
        start = self.offset(node.lineno, node.col_offset)
        end = self.offset(node.end_lineno, node.end_col_offset)
        return None if start is None or end is None else (start, end)

    def name_span(self, node: ast.arg) -> tuple[int, int] | None:
        """Half-open offsets of a parameter's name, without its annotation."""
        start = self.offset(node.lineno, node.col_offset)
        if start is None or not self.text.startswith(node.arg, start):
            return None
        return start, start + len(node.arg)


Named = TypeVar("Named", Function, Class)


def read_modules(root: Path, packages: list[str] | None = None) -> Iterator[Module]:
    """The modules below `root`, by dotted name; files that are not UTF-8 or do not parse are left out."""
    for name, path in module_files(root, packages):
        try:
            text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield Module(name, text, ast.parse(text))
        except (SyntaxError, ValueError, RecursionError):
            continue


def module_files(root: Path, packages: list[str] | None = None) -> list[tuple[str, Path]]:
    """Dotted names and paths, sorted by name. Raises DataError if there are none, or a package is not there."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name.isidentifier() and name not in SKIPPED_FOLDERS]
        parts = Path(folder).relative_to(root).parts
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension == ".py" and stem.isidentifier() and not stem.startswith(SKIPPED_PREFIXES):
                dotted = ".".join(parts if stem == "__init__" and parts else (*parts, stem))
                if os.path.isfile(path := os.path.join(folder, file)):  # and no dangling link
                    found[dotted] = Path(path)
    if not found:
        raise DataError(Problem(str(root), "no Python modules here", "Name the folder that holds json/ and email/."))
    known = sorted({name.partition(".")[0] for name in found})
    unknown = [package for package in packages or [] if package not in known]
    if unknown:
        raise DataError(
            *(Problem(str(root), f"no package or module '{package}'", nearest(package, known)) for package in unknown)
        )
    return [item for item in sorted(found.items()) if packages is None or item[0].partition(".")[0] in packages]


def nearest(package: str, known: list[str]) -> str:
    """A suggestion, but not the list of all two hundred names."""
    hint = did_you_mean(package, known)
    return hint if hint.startswith("Did") else "Remove it from `packages`."


def definitions(
    body: list[ast.stmt], prefix: str, owner: ast.ClassDef | None = None
) -> Iterator[tuple[str, FunctionNode | ast.ClassDef, ast.ClassDef | None]]:
    """Dotted name, node and enclosing class of each class, function and method; what functions define is theirs."""
    for node in body:
        if isinstance(node, FunctionNode):
            yield f"{prefix}.{node.name}", node, owner
        elif isinstance(node, ast.ClassDef):
            yield f"{prefix}.{node.name}", node, owner
            yield from definitions(node.body, f"{prefix}.{node.name}", node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for block in BLOCKS:
                for inner in getattr(node, block, []):
                    statements = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    yield from definitions(statements, prefix, owner)


def first_of_each_name(found: Iterable[Named]) -> list[Named]:
    unique: dict[str, Named] = {}
    for item in found:
        unique.setdefault(item.name, item)
    return list(unique.values())


def own_statements(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        if isinstance(node, FunctionNode | ast.ClassDef):
            continue
        yield node
        for block in BLOCKS:
            yield from own_statements(getattr(node, block, []))


def dotted_name(node: ast.AST | None) -> str:
    """`socket.error` for that Name or Attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (value := dotted_name(node.value)):
        return f"{value}.{node.attr}"
    return ""


def is_exception_name(name: str) -> bool:
    """Whether a raised or caught name is a class and not a variable: `KeyError`, `zlib.error`, not `err`, `self.Error`."""
    root, _, _ = name.partition(".")
    last = name.rpartition(".")[2]
    return bool(name) and root not in ("self", "cls") and (last[0].isupper() or last == "error")


def raised_expression(node: ast.Raise) -> ast.expr | None:
    """The class in `raise Class` or `raise Class(...)`, or None."""
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return raised if is_exception_name(dotted_name(raised)) else None


def choice(key: str, num_options: int) -> int:
    """A number below `num_options` that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_options
