"""Where in a text something stands that data says the offset of, in whatever units it counts."""

from __future__ import annotations

import re
from itertools import islice

from stages.lib.sources.conversion import Conversion, Dropped

UNITS: dict[str, tuple[str, int]] = {"utf16": ("utf-16-le", 2), "utf8": ("utf-8", 1)}
"""What offsets may count instead of characters -> its encoding, and bytes per unit. Browsers, JavaScript and Java count
UTF-16 units, Go and Rust bytes of UTF-8."""


def characters_before(text: str, offset: int, unit: str) -> int | None:
    """How many characters the first `offset` units are; None where it lies outside the text or inside a character."""
    encoding, size = UNITS[unit]
    if offset < 0:
        return None
    # A character has at least one unit, so that many characters are enough. Half of a pair is never kept.
    units = text[:offset].encode(encoding, "replace")[: offset * size]
    if len(units) < offset * size:
        return None
    try:
        return len(units.decode(encoding))
    except UnicodeDecodeError:
        return None


def find_part(text: str, part: str, start: int, conversion: Conversion, *, moved: str) -> int | None:
    """Where `part` stands, of which data says a `start` where it does not: its only place, which counts as the repair
    `moved`; of several the one that `start` tells in UTF-16 units or bytes of UTF-8; None where it stands nowhere.

    Raises `Dropped` where it stands several times, and no reading of `start`, or two, lead to one of the places.
    """
    found = re.finditer(f"(?={re.escape(part)})", text)
    places = [match.start() for match in islice(found, 2)]
    if len(places) < 2:
        conversion.repair(moved, len(places))
        return places[0] if places else None
    read = {unit: characters_before(text, start, unit) for unit in UNITS}
    fitting = {unit: place for unit, place in read.items() if place is not None and text.startswith(part, place)}
    if len(set(fitting.values())) != 1:
        raise Dropped("ambiguous_place", f"{part!r} stands several times, and not at {start}")
    unit, place = next(iter(fitting.items()))
    conversion.repair(f"offset_in_{unit}")
    return place
