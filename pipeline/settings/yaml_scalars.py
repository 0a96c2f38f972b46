"""Scalars of YAML 1.2's core schema, and where this reader is stricter."""

from __future__ import annotations

import math
import re

from pipeline.errors import shown

MOST_DIGITS = 100
"""Of a number. Converting millions of digits takes long, and nothing that a recipe sets needs them."""


def not_a_number_here(text: str, why: str) -> ValueError:
    return ValueError(f"the number {shown(text)} {why}")


def read_int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise not_a_number_here(text, f"has {len(text):,} digits, and {MOST_DIGITS} are the most")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def read_float(text: str) -> float:
    if len(text) > MOST_DIGITS:
        raise not_a_number_here(text, f"has {len(text):,} digits, and {MOST_DIGITS} are the most")
    value = float(text)
    if math.isinf(value):
        raise not_a_number_here(text, "is too large for a float")
    if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise not_a_number_here(text, "is too close to 0 for a float")
    return value


def refuse_not_finite(text: str) -> float:
    raise not_a_number_here(text, "is not finite")


BEGINNINGS = frozenset("~nNtTfF-+.0123456789")
"""What a value that is no string begins with, if it is not empty."""
