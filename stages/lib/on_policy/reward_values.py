"""What a reward's value must be like, and how it is told where it is not.

Only the standard library: processes that call a user's function load this file alone.
"""

from __future__ import annotations

import math
import re
import reprlib
import traceback
from numbers import Real
from pathlib import Path
from typing import Any


class Unscorable(Exception):
    """There is no reward for this sample: what is wrong, and what to do. Rewards raise it where a row lacks something."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint


def number_of(value: Any) -> float:
    """The value as a float. Raises `Unscorable` if it is not one finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Unscorable(f"it gave {described(value)} instead of one number", "A reward is one number.")
    if not math.isfinite(value):
        raise Unscorable(f"it gave {float(value)}", "A reward must be finite.")
    return float(value)


LONGEST_TEXT = 1 << 18
"""Characters of what a function may give: more is no observation that a model reads."""


def text_of_value(value: Any) -> str | None:
    """The value, if it is a text or None. Raises `Unscorable` otherwise, and for a text that cannot be written as UTF-8."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unscorable(f"it gave {described(value)} instead of a text or None", "An observation is one text.")
    if len(value) > LONGEST_TEXT:
        raise Unscorable(f"it gave a text of {len(value):,} characters, and {LONGEST_TEXT:,} are the most")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unscorable(f"it gave a text with half of a character at {error.start:,}") from None
    return str(value)


def described(value: Any) -> str:
    """What a value that is not what was wanted is."""
    if value is None or isinstance(value, bool | str):
        return reprlib.repr(value)
    kind = type(value).__name__
    try:
        count = len(value)
    except TypeError:
        return f"one {kind}"
    return f"{count} value{'s' if count != 1 else ''} ({kind})"


def raised(error: BaseException) -> str:
    """What a function raised, and in which line of which file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"it raised {type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group (without groups: the whole) of the last match in which that is more than whitespace."""
    group = min(pattern.groups, 1)
    found = [match[group] for match in pattern.finditer(text) if (match[group] or "").strip()]
    return found[-1] if found else None
