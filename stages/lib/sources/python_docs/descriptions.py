"""What a docstring says first, as prose on one line."""

from __future__ import annotations

import re

LONGEST_DESCRIPTION_CHARACTERS = 300
FEWEST_DESCRIPTION_WORDS = 3

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(<*])")
SIGNATURE_LINE = re.compile(r"^[\w.]+\s*\(.*\)\s*(->[^.]*)?\.?$", re.DOTALL)
SIGNATURE_LEAD = re.compile(r"^[\w.]+\s*\([^()]*\)\s*(->[^.]*?)?\s*(--|:)\s+")


def sentences_of(paragraph: str) -> list[str]:
    return SENTENCE_END.split(paragraph)


def description_of(docstring: str) -> str:
    """What the docstring says first: whole sentences of its first paragraph, on one line. Empty if there is no such.

    A paragraph that only repeats the signature does not count, and an indented line (code, a list) ends a paragraph.
    """
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines: list[str] = []
        for line in block.split("\n"):
            if lines and line[:1].isspace():
                break
            lines.append(line)
        paragraph = SIGNATURE_LEAD.sub("", " ".join(" ".join(lines).split()))
        if not SIGNATURE_LINE.match(paragraph):
            return shortened(paragraph)
    return ""


def shortened(paragraph: str) -> str:
    """As many whole sentences as fit; empty if that is none, or what remains is no prose."""
    kept = ""
    for sentence in sentences_of(paragraph):
        if len(kept) + 1 + len(sentence) > LONGEST_DESCRIPTION_CHARACTERS:
            break
        kept = f"{kept} {sentence}".lstrip()
    is_prose = len(kept.split()) >= FEWEST_DESCRIPTION_WORDS and not kept.endswith(":") and ">>>" not in kept
    return kept if is_prose else ""
