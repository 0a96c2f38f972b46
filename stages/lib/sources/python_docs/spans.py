"""Extraction: parameter names, types and exceptions in a function's source, with exact offsets.

`parameter`  the name of a parameter in a `def` line, nested functions' too; not `self` or `cls`
`type`       each dotted name in an annotation; the second argument of `isinstance` and `issubclass`; and a builtin type
             (`int`, `list`, ...) wherever it stands as a name of its own, if the function gives that name no other use
`exception`  the class, dotted where it is, after `raise` and `except`; not a variable that holds an exception

Names inside strings are no spans, f-strings included: before Python 3.12 their positions are not exact.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import (
    Excerpt,
    Function,
    FunctionNode,
    Module,
    dotted_name,
    is_exception_name,
    raised_expression,
)

LONGEST_TEXT_CHARACTERS = 400
FEWEST_SPANS = 2
BUILTIN_TYPES = frozenset(
    "bool bytearray bytes complex dict float frozenset int list memoryview object set str tuple".split()
)


def span_rows(module: Module) -> Iterator[Row]:
    """Span rows: one per function whose source fits and holds enough to find."""
    for function in module.functions:
        excerpt = function.excerpt(LONGEST_TEXT_CHARACTERS)
        if not excerpt.is_whole:
            continue
        spans = spans_in(function, excerpt)
        if len(spans) >= FEWEST_SPANS:
            yield {"id": f"{function.name}#spans", "text": excerpt.text, "spans": spans}


def spans_in(function: Function, excerpt: Excerpt) -> list[Row]:
    """The spans in order of their start. None overlap: where a name is two things, exception and annotation win."""
    found: dict[tuple[int, int], str] = {}
    for place, label in labelled_places(function.node, excerpt):
        if place is not None:
            found.setdefault(place, label)
    return [{"start": start, "end": end, "label": label} for (start, end), label in sorted(found.items())]


def labelled_places(function: FunctionNode, excerpt: Excerpt) -> Iterator[tuple[tuple[int, int] | None, str]]:
    nodes = list(nodes_outside_strings(function))
    for node in nodes:
        if isinstance(node, FunctionNode):
            for argument in arguments_of(node):
                if argument.arg not in ("self", "cls"):
                    yield excerpt.name_span(argument), "parameter"
                yield from ((excerpt.span(name), "type") for name in outermost_names(argument.annotation))
            yield from ((excerpt.span(name), "type") for name in outermost_names(node.returns))
        elif isinstance(node, ast.AnnAssign):
            yield from ((excerpt.span(name), "type") for name in outermost_names(node.annotation))
        elif isinstance(node, ast.Raise):
            if (raised := raised_expression(node)) is not None:
                yield excerpt.span(raised), "exception"
        elif isinstance(node, ast.ExceptHandler):
            for name in outermost_names(node.type):
                if is_exception_name(dotted_name(name)):
                    yield excerpt.span(name), "exception"
        elif (
            isinstance(node, ast.Call)
            and dotted_name(node.func) in ("isinstance", "issubclass")
            and len(node.args) == 2
        ):
            yield from ((excerpt.span(name), "type") for name in outermost_names(node.args[1]))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    taken = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    taken |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for name in names:
        if name.id in BUILTIN_TYPES - taken:
            yield excerpt.span(name), "type"


def nodes_outside_strings(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, in no order, but for f-strings and template strings."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if type(node).__name__ in ("JoinedStr", "TemplateStr"):
            continue
        yield node
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                waiting.append(value)
            elif isinstance(value, list):
                waiting += [child for child in value if isinstance(child, ast.AST)]


def arguments_of(node: FunctionNode) -> list[ast.arg]:
    arguments = node.args
    starred = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]


def outermost_names(node: ast.AST | None) -> Iterator[ast.expr]:
    """The dotted names in an expression: `dict`, `str` and `t.Any` of `dict[str, t.Any]`."""
    if node is None:
        return
    if isinstance(node, ast.Name | ast.Attribute) and dotted_name(node):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from outermost_names(child)
