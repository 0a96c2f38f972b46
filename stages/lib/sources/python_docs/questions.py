"""Extractive questions about a function's source, answered by a stretch of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.modules import Excerpt, Function, Module, choice, dotted_name, raised_expression

LONGEST_CONTEXT_CHARACTERS = 400
LONGEST_ANSWER_CHARACTERS = 60

Place = tuple[int, int]


def question_rows(module: Module) -> Iterator[Row]:
    """Question rows, each with one answer: per function what it raises, one default, and one question of the rest."""
    for function in module.functions:
        excerpt = function.excerpt(LONGEST_CONTEXT_CHARACTERS)
        for kind, question, place in questions_about(function, excerpt):
            if place is None:
                continue
            start, end = place
            answer = excerpt.text[start:end]
            if 0 < len(answer) <= LONGEST_ANSWER_CHARACTERS and "\n" not in answer:
                yield {
                    "id": f"{function.name}#{kind}",
                    "context": excerpt.text,
                    "question": question,
                    "answers": [{"start": start, "text": answer}],
                }


def questions_about(function: Function, excerpt: Excerpt) -> Iterator[tuple[str, str, Place | None]]:
    """Kind, question, and the answer's offsets (None where the excerpt ends before it)."""
    name = function.node.name
    raises = (raised_expression(node) for node in function.statements if isinstance(node, ast.Raise))
    raised = [node for node in raises if node is not None]
    if len({dotted_name(node) for node in raised}) == 1:
        yield "raise", f"Which exception does `{name}` raise?", excerpt.span(raised[0])
    defaults = [(each.name, each.default) for each in function.parameters if each.default is not None]
    if defaults:
        parameter, default = defaults[choice(f"{function.name} default", len(defaults))]
        yield "default", f"What is the default value of `{parameter}` in `{name}`?", excerpt.span(default)
    # Nearly every function has these: one of them each, or the kinds above would drown.
    rest: list[tuple[str, str, Place | None]] = []
    if len(function.parameters) > 1:
        first, last = function.parameters[0], function.parameters[-1]
        rest.append(("first", f"What is the first parameter of `{name}`?", excerpt.name_span(first.node)))
        rest.append(("last", f"What is the last parameter of `{name}`?", excerpt.name_span(last.node)))
    if (returned := returned_expression(function)) is not None:
        rest.append(("return", f"What does `{name}` return?", excerpt.span(returned)))
    if rest:
        yield rest[choice(f"{function.name} question", len(rest))]


def returned_expression(function: Function) -> ast.expr | None:
    """What the function's only `return` returns; None if there are several, or it is None, or a generator's."""
    returned = [node.value for node in function.statements if isinstance(node, ast.Return) and node.value is not None]
    if len(returned) != 1 or (isinstance(returned[0], ast.Constant) and returned[0].value is None):
        return None
    lines = function.module.lines[function.node.lineno - 1 : function.node.end_lineno]
    if any("yield" in line for line in lines):
        is_generator = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function.node))
        return None if is_generator else returned[0]
    return returned[0]
