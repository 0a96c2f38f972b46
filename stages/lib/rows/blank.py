"""Whether anything of a text shows."""

from __future__ import annotations

import re

VISIBLE = re.compile(
    r"[^\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
"""Anything but spaces, U+2800 (Braille without a dot), and what Unicode calls default ignorable, such as U+200B: none of these
shows."""


def is_blank(text: str) -> bool:
    """Whether nothing of the text shows."""
    return VISIBLE.search(text) is None
