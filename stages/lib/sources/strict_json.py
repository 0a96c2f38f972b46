"""JSON from outside: a key that stands twice in one mapping says two things, and neither is taken."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


class RepeatedKey(ValueError):
    """A mapping has the key twice."""


def parse_json(text: str) -> Any:
    """The value that the text holds. Raises `RepeatedKey` where a mapping has a key twice, and `ValueError` if it is no JSON."""
    return json.loads(text, object_pairs_hook=without_repeats)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKey(f"'{counts.most_common(1)[0][0]}'")
    return found
