"""The console as a conversation has it: lines that the user writes, and text that appears as it comes."""

from __future__ import annotations

import sys


def read_line() -> str | None:
    """The user's next line, after a prompt where a person writes it; None at the end."""
    try:
        return input("you> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def show_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
