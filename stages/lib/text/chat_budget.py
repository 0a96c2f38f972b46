"""What the rendering of a chat template may make, take and cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import GeneratorType
from typing import Any, NamedTuple

from jinja2 import TemplateError

MAX_SECONDS = 5.0
"""Processor time of one rendering, which takes milliseconds in a template that does nothing odd."""

MAX_DEPTH = 100
"""Levels of lists and mappings in each other."""

MAX_INTEGER_BITS = 4096


class OverLimit(TemplateError):
    """The template asks for more time or memory than a rendering may take."""


CONTAINERS = (list, tuple, dict, set, frozenset)


class Weight(NamedTuple):
    """How large a value is with everything in it, an object counted as often as it is named."""

    items: int
    characters: int
    depth: int


LOOK_EVERY = 1000
"""What may be used up between two looks at the clock, which take longer than most operations."""


class Budget:
    """What one rendering may use: fixed amounts, and more for a longer chat."""

    def __init__(self, characters: int) -> None:
        self.size = 1_000_000 + 20 * characters
        """Most characters of one value."""
        self.items = 200_000 + 2 * characters
        """Most items of one value, those of its items included."""
        self.left = 100_000_000 + 1_000 * characters
        """Characters that may still be made, all values together; an operation counts as 16."""
        self.next_look = self.left - LOOK_EVERY
        self.deadline = time.thread_time() + MAX_SECONDS

    def spend(self, characters: int) -> None:
        self.left -= characters + 16
        if self.left < self.next_look:
            self.look()

    def look(self) -> None:
        self.next_look = self.left - LOOK_EVERY
        if self.left < 0:
            raise OverLimit("it does or writes far more than a chat of this length can need")
        if time.thread_time() > self.deadline:
            raise OverLimit(f"it takes more than {MAX_SECONDS:.0f} s of processor time")

    def require(self, size: float) -> None:
        """Raises `OverLimit` if something of this size is too large to be made."""
        if size > self.size:
            raise OverLimit(f"it asks for a value of more than {self.size:,} characters")

    def require_items(self, number: int) -> None:
        if number > self.items:
            raise OverLimit(f"it asks for a value of more than {self.items:,} items")

    def made(self, value: Any) -> Any:
        """The value, known to be of a bounded size; a generator as one whose items are counted."""
        if isinstance(value, str):
            self.require(len(value))
            self.spend(len(value))
        elif isinstance(value, int):
            require_bits(value.bit_length())
        elif isinstance(value, CONTAINERS):
            self.spend(self.weigh(value).items)
        elif isinstance(value, GeneratorType):
            return self.counted(value)
        return value

    def joined(self, *values: Any) -> str:
        """What `~` makes."""
        text = "".join(map(str, values))
        self.require(len(text))
        self.spend(len(text))
        return text

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        number = characters = 0
        for item in items:
            weight = self.weigh(item)
            number += weight.items
            characters += weight.characters
            self.require(characters)
            self.require_items(number)
            self.spend(weight.items)
            yield item

    def weigh(self, value: Any) -> Weight:
        """The weight of a value. Raises `OverLimit` if it is too heavy, before more of it is looked at."""
        items = characters = deepest = 0
        level = [value]
        while level:
            below: list[Any] = []
            for each in level:
                items += 1
                if isinstance(each, str):
                    characters += len(each)
                elif isinstance(each, int):
                    require_bits(each.bit_length())
                elif isinstance(each, Mapping):
                    below += each.keys()
                    below += each.values()
                elif isinstance(each, list | tuple | set | frozenset):
                    below += each
                self.require(characters)
                self.require_items(items + len(below))
            deepest += 1
            if deepest > MAX_DEPTH:
                raise OverLimit(f"it puts more than {MAX_DEPTH} lists or mappings into each other")
            level = below
        return Weight(items, characters, deepest)


def require_bits(bits: float) -> None:
    if bits > MAX_INTEGER_BITS:
        raise OverLimit(f"it asks for a whole number of more than {MAX_INTEGER_BITS} bits")
