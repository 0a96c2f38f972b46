"""Control characters in what a source gave: what becomes of them, and of what they are the sign."""

from __future__ import annotations

import re

from stages.lib.curation.normalization import CONTROL_BUT_RETURN, Normalization
from stages.lib.curation.said import texts_said
from stages.lib.rows.canonical import FORMATS, Row
from stages.lib.rows.ledger import Ledger

OF_LATIN_1 = re.compile(r"[\x80-\x84\x86-\x9f]")
"""What ISO-8859-1 makes of bytes that are letters in other encodings; U+0085 is a line end of some systems."""

SIGN_OF_CP1252 = (
    "characters from U+0080 to U+009F, which nobody writes: bytes that cp1252 (Windows) has as quotes, dashes and the euro "
    "sign, read as ISO-8859-1. Set `encoding: cp1252` in the source"
)


def notice_control_characters(
    ledger: Ledger, where: str, row: Row, format: str, normalization: Normalization | None
) -> None:
    """Counts a row with control characters, which normalization takes out, and one whose encoding was another one."""
    texts = [said.text for said in texts_said(row)]
    if found := first_of(OF_LATIN_1, texts):
        ledger.notice(SIGN_OF_CP1252, f"{where}: {found}")
        return
    taken_out = normalization is not None and normalization.control_characters and FORMATS[format].rewritten
    if taken_out and (found := first_of(CONTROL_BUT_RETURN, texts)):
        ledger.notice("control characters were taken out (normalization.control_characters)", f"{where}: {found}")


def first_of(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    """The first match, by its number, and what stands behind it; None if there is none."""
    for text in texts:
        if match := pattern.search(text):
            return f"U+{ord(match[0]):04X} before {text[match.end() : match.end() + 20]!r}"
    return None
