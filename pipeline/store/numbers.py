"""Numbers in what is written: finite, or refused, or in a journal named as what they are."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from pipeline.errors import DataError, Problem
from pipeline.figures import number


def json_text(value: Any, where: str, *, indent: int | None = None, hint: str = "") -> str:
    """`value` as JSON that every program reads and UTF-8 can hold.

    Raises `DataError` if a number in it is not finite: JSON has no word for that. `where` says what it is for.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        odd = dict(not_finite(value))
        if not odd:
            raise
        raise DataError(*(Problem(where, f"{path} is {said}", hint) for path, said in odd.items())) from None
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, as names of files can hold
        return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False)
    return text


def not_finite(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, "nan", "inf" or "-inf") of each number in `value` that is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path or "it", str(float(value))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from not_finite(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from not_finite(inner, f"{path}.{index}" if path else str(index))


def without(value: Any) -> Any:
    """`value` with null in place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without(inner) for inner in value]
    return value


def require_finite(metrics: Mapping[str, Any], where: str, hint: str = "Nothing was published.") -> None:
    """Raises `DataError` with the name of each metric that is not one finite number. `where` says what was measured."""
    problems = [
        Problem(where, f"{name} is {number(value) if is_plain(value) else reprlib.repr(value)}", hint)
        for name, value in metrics.items()
        if isinstance(value, bool) or not isinstance(value, Real) or not is_finite(value)
    ]
    if problems:
        raise DataError(*problems)


def is_plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a float can hold the number."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
