"""Chats of two to four turns about one function or class. A turn is asked only where the source has the answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.descriptions import sentences_of
from stages.lib.sources.python_docs.modules import (
    Class,
    Function,
    Module,
    choice,
    dotted_name,
    raised_expression,
)

MOST_METHODS_NAMED = 8
LONGEST_RETURN_CHARACTERS = 200

FUNCTION_PURPOSE = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.")
CLASS_PURPOSE = ("What is `{}`?", "What is the class `{}` for?", "Explain the class `{}`.")
PARAMETERS = ("What are its parameters?", "Which parameters does it take?", "And its parameters?")
RETURNS = ("What does it return?", "And what does it return?", "What is the return value?")
RAISES = ("What does it raise?", "Which exceptions can it raise?", "And which exceptions does it raise?")
BASES = ("What does it derive from?", "Which classes does it inherit from?")
METHODS = ("Which methods does it have?", "What are its public methods?")


def chat_rows(module: Module) -> Iterator[Row]:
    """Chat rows: one per function and class that has a description."""
    for function in module.functions:
        if function.description:
            yield chat_about(function.name, function_turns(function))
    for described in module.classes:
        if described.description:
            yield chat_about(described.name, class_turns(described))


def chat_about(name: str, turns: Iterator[tuple[str, str]]) -> Row:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{name}#chat", "messages": messages}


def function_turns(function: Function) -> Iterator[tuple[str, str]]:
    yield worded(FUNCTION_PURPOSE, function.name).format(function.call), function.description
    if not function.is_property:
        yield worded(PARAMETERS, function.name), parameters_answer(function)
    if returned := returned_thing(function):
        yield worded(RETURNS, function.name), f"It returns {returned}"
    if raised := raised_names(function):
        yield worded(RAISES, function.name), f"It raises {listed(raised, 'or')}."


def class_turns(described: Class) -> Iterator[tuple[str, str]]:
    yield worded(CLASS_PURPOSE, described.name).format(described.name), described.description
    bases = [name for base in described.node.bases if (name := dotted_name(base)) and name != "object"]
    if bases:
        yield worded(BASES, described.name), f"It derives from {listed(bases, 'and')}."
    for function in described.functions:
        if function.node.name == "__init__":
            yield worded(PARAMETERS, described.name), parameters_answer(function)
    public = [f.node.name for f in described.functions if not f.node.name.startswith("_") and not f.is_property]
    if public:
        named = listed(public[:MOST_METHODS_NAMED], "and")
        more = ", among others" if len(public) > MOST_METHODS_NAMED else ""
        yield worded(METHODS, described.name), f"It has {named}{more}."


def worded(wordings: tuple[str, ...], name: str) -> str:
    """One of the wordings; the first of them listed says which turn it is, so that turns vary independently."""
    return wordings[choice(f"{name} {wordings[0]}", len(wordings))]


def parameters_answer(function: Function) -> str:
    if not function.parameters:
        return "It takes no parameters."
    named = []
    for parameter in function.parameters:
        default = parameter.default_text
        named.append(f"`{parameter.mark}{parameter.name}`" + ("" if default is None else f" (`{default}` by default)"))
    return f"It takes {joined_with(named, 'and')}."


def returned_thing(function: Function) -> str:
    """What follows `It returns`: from a sentence of the description, else from the annotation, else empty."""
    for sentence in sentences_of(function.description):
        if (match := re.match(r"Returns? (.+)$", sentence)) and len(match[1]) <= LONGEST_RETURN_CHARACTERS:
            return match[1]
    annotation = function.node.returns
    if annotation is None:
        return ""
    if isinstance(annotation, ast.Constant):
        return f"`{annotation.value}`." if isinstance(annotation.value, str) else ""
    return f"`{ast.unparse(annotation)}`."


def raised_names(function: Function) -> list[str]:
    """Exceptions that the function's own `raise` statements name, in order, each once."""
    raised = [raised_expression(node) for node in function.statements if isinstance(node, ast.Raise)]
    return list(dict.fromkeys(dotted_name(node) for node in raised if node is not None))


def listed(names: list[str], word: str) -> str:
    return joined_with([f"`{name}`" for name in names], word)


def joined_with(items: list[str], word: str) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
