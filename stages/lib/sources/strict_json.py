"""JSON from outside: a key that stands twice in one mapping says two things, and neither is taken."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")
"""What bytes that are no UTF-8 become where they are to spoil only what holds them."""


class RepeatedKey(ValueError):
    """A mapping has the key twice."""


class Repeating(dict[str, Any]):
    """A mapping that has a key twice, in a document whose other parts are read. It holds what the last one says."""

    def __init__(self, found: dict[str, Any], key: str) -> None:
        super().__init__(found)
        self.key = key


def parse_json(text: str) -> Any:
    """The value that the text holds. Raises `RepeatedKey` where a mapping has a key twice, and `ValueError` if it is no JSON."""
    return json.loads(text, object_pairs_hook=without_repeats)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKey(repeated_key(pairs))
    return found


def repeated_key(pairs: list[tuple[str, Any]]) -> str:
    counts = Counter(key for key, _ in pairs)
    return f"'{counts.most_common(1)[0][0]}'"


@dataclass(frozen=True)
class Fault:
    """Why a part of a document is not taken: `reason` is one of `conversion.REASONS`. `place` leads to it: `data[7].title`."""

    reason: str
    place: str
    detail: str


class Document:
    """A JSON document of which parts may be faulty: a mapping with a key twice, or text with bytes that are no UTF-8."""

    def __init__(self, content: bytes) -> None:
        """Raises `ValueError` if it is no JSON, and `UnicodeDecodeError` if that may be because it is no UTF-8."""
        self.repeats = False
        self.undecodable: UnicodeDecodeError | None = None
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            self.undecodable = error
            text = content.decode("utf-8", "surrogateescape")
        try:
            self.value = json.loads(text, object_pairs_hook=self.with_repeats)
        except ValueError:
            if self.undecodable:
                raise self.undecodable from None
            raise

    def with_repeats(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = dict(pairs)
        if len(found) == len(pairs):
            return found
        self.repeats = True
        return Repeating(found, repeated_key(pairs))

    @property
    def is_whole(self) -> bool:
        return not self.repeats and self.undecodable is None

    def fault_in(self, value: Any) -> Fault | None:
        """The first fault in a part of the document, its place told from there; None where it has none."""
        if self.is_whole:
            return None
        waiting: list[tuple[str, Any]] = [("", value)]
        while waiting:
            place, part = waiting.pop()
            if isinstance(part, Repeating):
                return Fault("repeated_key", place.removeprefix("."), part.key)
            if isinstance(part, str) and self.undecodable and ESCAPED_BYTE.search(part):
                return Fault("not_utf8", place.removeprefix("."), f"byte {self.undecodable.start}")
            waiting += reversed(list(parts_of(place, part)))
        return None


def parts_of(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(place, part) of what a mapping or a list holds; the names of a mapping are parts of it too."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield place, name
            yield f"{place}.{name}", part
    elif isinstance(value, list):
        yield from ((f"{place}[{index}]", part) for index, part in enumerate(value))
