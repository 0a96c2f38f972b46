"""The filters of chat templates that can make much of little, each after a look at what it would make."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import Context

from stages.lib.text.chat_budget import Budget, require_bits


def budget_of(context: Context) -> Budget:
    environment: Any = context.environment
    budget: Budget = environment.budget
    return budget


@pass_context
def guarded_center(context: Context, value: Any, width: int = 80) -> Any:
    budget_of(context).require(width)
    return original(context, "center", value, width)


@pass_context
def guarded_indent(context: Context, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    step = len(width) if isinstance(width, str) else width
    budget_of(context).require(step * (len(s.splitlines()) + 1))
    return original(context, "indent", s, width, first, blank)


@pass_context
def guarded_batch(context: Context, value: Any, linecount: int, fill_with: Any = None) -> Any:
    budget_of(context).require(linecount)
    return original(context, "batch", value, linecount, fill_with)


@pass_context
def guarded_slice(context: Context, value: Any, slices: int, fill_with: Any = None) -> Any:
    budget_of(context).require(slices)
    return original(context, "slice", value, slices, fill_with)


@pass_context
def guarded_replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    budget_of(context).require(str(s).count(str(old)) * len(str(new)))
    return original(context, "replace", s, old, new, count)


@pass_context
def guarded_join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> Any:
    items = list(value)
    budget_of(context).require(len(items) * len(str(d)))
    return original(context, "join", items, d, attribute)


@pass_context
def guarded_round(context: Context, value: Any, precision: int = 0, method: Any = "common") -> Any:
    require_bits(4 * abs(precision))
    return original(context, "round", value, precision, method)


@pass_context
def guarded_format(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    environment: Any = context.environment
    environment.require_format(str(value), kwargs or args)
    return environment.call_filter("format ", value, args, kwargs, context)


GUARDS: dict[str, Callable[..., Any]] = {
    "center": guarded_center,
    "indent": guarded_indent,
    "batch": guarded_batch,
    "slice": guarded_slice,
    "replace": guarded_replace,
    "join": guarded_join,
    "round": guarded_round,
    "format": guarded_format,
}


def original(context: Context, name: str, value: Any, *args: Any) -> Any:
    return context.environment.call_filter(f"{name} ", value, args, context=context)


@pass_context
def add_up(context: Context, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    environment: Any = context.environment
    if attribute is not None:
        iterable = environment.call_filter("map", iterable, kwargs={"attribute": attribute}, context=context)
    total = start
    for item in iterable:
        total = environment.call_binop(context, "+", total, item)
    return total


@pass_context
def to_json(
    context: Context,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that HTML needs, as chat templates expect it."""
    budget = budget_of(context)
    weight = budget.weigh(x)
    step = len(indent) if isinstance(indent, str) else indent or 0
    budget.require(weight.items * (step * weight.depth + sum(map(len, separators or ()))))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
