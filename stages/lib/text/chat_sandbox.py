"""Chat templates as programs of strangers: rendered as transformers does it, but not without bounds.

Every value that comes into being is of a bounded size, so no single operation lasts long; between operations the
processor's time is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime, time
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from stages.lib.text.chat_bounding import CHECKS, Bounding
from stages.lib.text.chat_budget import CONTAINERS, Budget, OverLimit, require_bits
from stages.lib.text.chat_filters import GUARDS, add_up, to_json
from stages.lib.text.template_date import told_date

MAX_TEMPLATE_CHARACTERS = 200_000
"""Several times the longest template that is known to be in use; a second or two to read it."""

LEFT_OUT_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""For web pages and debugging, and costly without bound, or (`random`) of another result each time."""

LEFT_OUT_GLOBALS = ("cycler", "lipsum")

LEFT_OUT_METHODS = frozenset({"encode", "decode", "to_bytes", "from_bytes"})
"""Bytes are no text, and some codecs take the square of the text's length in time."""


class Refusal(TemplateError):
    """The template itself refuses the chat, by `raise_exception`."""


class PlainNamespace(Namespace):
    """A namespace that is written without what it holds, which may be more than can be written."""

    def __repr__(self) -> str:
        return "<Namespace>"


OF_CALLS = ("_loop_vars", "_block_vars")
"""What jinja2 adds to the arguments of each call."""


class Formatter(SandboxedFormatter):
    """What `str.format` does, with bounded widths."""

    def __init__(self, environment: ChatEnvironment) -> None:
        super().__init__(environment)
        self.environment = environment

    def format_field(self, value: Any, format_spec: str) -> str:
        self.environment.require_widths(format_spec)
        text: str = self.environment.budget.made(super().format_field(value, format_spec))
        return text


class GenerationBlocks(Extension):
    """`{% generation %}`: marks what the assistant says. It is found out otherwise, also where a template has no such marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates know it, with a budget. One rendering at a time."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlocks, loopcontrols],
            finalize=self.written,
        )
        self.budget = Budget(0)
        for name in LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in LEFT_OUT_GLOBALS:
            del self.globals[name]
        for name, guard in GUARDS.items():
            self.filters[f"{name} "] = self.filters[name]
            self.filters[name] = guard
        self.filters |= {"tojson": to_json, "sum": add_up, **CHECKS}
        self.globals |= {"raise_exception": refuse, "strftime_now": now, "namespace": PlainNamespace}

    def written(self, value: Any) -> str:
        """What `{{ value }}` writes."""
        text = value if type(value) is str else str(value)
        self.budget.spend(len(text))
        return text

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in LEFT_OUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, of_mapping = str(value.__self__), value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if of_mapping:
                (kwargs,), args = args, ()
            return Formatter(self).vformat(text, args, kwargs)

        return formatted

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = self.budget
        budget.spend(0)
        given = [*args, *(value for name, value in kwargs.items() if name not in OF_CALLS)]
        if any(isinstance(each, CONTAINERS) for each in given):
            budget.spend(budget.weigh(given).items)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = self.bounded_arguments(owner, obj.__name__, args, given)
        return budget.made(super().call(context, obj, *args, **kwargs))

    def bounded_arguments(self, text: str, method: str, args: tuple[Any, ...], given: list[Any]) -> tuple[Any, ...]:
        """The arguments of a string's method. Raises `OverLimit` if its result would be too large."""
        if method in ("center", "ljust", "rjust", "zfill") and given:
            self.budget.require(given[0])
        elif method == "expandtabs" and given:
            self.budget.require(text.count("\t") * given[0])
        elif method == "replace" and len(given) > 1:
            self.budget.require(text.count(given[0]) * len(given[1]))
        elif method == "translate" and isinstance(given[0], Mapping):
            self.budget.require(len(text) * max(map(len, filter(is_text, given[0].values())), default=1))
        elif method == "join" and given:
            args = (list(given[0]),)
            self.budget.require(len(text) * len(args[0]))
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = (left.bit_length(), right.bit_length())
            require_bits(bits[0] * max(right, 1) if operator == "**" else sum(bits) if operator == "*" else max(bits))
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and hasattr(value, "__len__"):
                    self.budget.require(len(value) * count)
        elif operator == "%" and isinstance(left, str):
            self.require_format(left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def require_format(self, text: str, values: Any) -> None:
        """Raises `OverLimit` if `text % values` may be too large."""
        self.require_widths(text)
        if "*" in text:
            self.require_widths(str(values))
        if isinstance(values, Mapping):
            self.budget.require(text.count("%") * self.budget.weigh(values).characters)

    def require_widths(self, text: str) -> None:
        self.budget.require(sum(float(number) for number in re.findall(r"\d+", text)))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def refuse(message: Any) -> None:
    raise Refusal(str(message))


def now(format: str) -> str:
    """`strftime_now` of the templates: the same on every day."""
    return datetime.combine(told_date(), time()).strftime(format)


@lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    """The template as a program, with its own environment."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise OverLimit(f"it has {len(template):,} characters, more than {MAX_TEMPLATE_CHARACTERS:,}")
    environment = ChatEnvironment()
    tree = Bounding(environment).visit(environment.parse(template))
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


def render_template(template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    """The rendered chat.

    Raises `Refusal` where the template refuses the chat, `OverLimit` where it takes too much, and whatever else happens
    in it.
    """
    program = compiled(template)
    environment: ChatEnvironment = program.environment
    environment.budget = Budget(len(json.dumps(messages, ensure_ascii=False, allow_nan=False)))
    return "".join(program.generate(messages=messages, **variables))
