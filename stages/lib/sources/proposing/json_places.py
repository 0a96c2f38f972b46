"""Where in a JSON document lists of rows stand, as the option `records` names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.sources.encodings import text_blocks
from stages.lib.sources.json_reader import MAX_DOCUMENT_BYTES
from stages.lib.sources.lines import UTF8_MARK, Damaged
from stages.lib.sources.strict_json import Document

SPLITS = ("train", "training", "data", "rows", "examples", "validation", "valid", "val", "dev", "test")
"""Names of parts of a data set, in the order in which they are proposed."""

DEEPEST = 3
MOST_PLACES = 12
MOST_LISTED = 8


def places_in(path: Path, encoding: str | None) -> list[tuple[str | None, str]]:
    """(place, why) of the lists of rows in the document, the likeliest first; (None, "") where it is one record itself."""
    try:
        document = read_whole(path, encoding)
    except (ValueError, RecursionError, Damaged):
        return [(None, "")]  # the reader says what is wrong with it
    if not isinstance(document, dict):
        return [(None, "")]
    lists = list(lists_below(document, "", DEEPEST))
    entries = [place for place in lists if "." not in place[0]]
    found: list[tuple[str | None, str]] = []
    if len(entries) > 1 and len(entries) == len(document) and not any(is_split(name) for name, _ in entries):
        found.append(("*", f"each of its {len(entries):,} entries is a list of rows, whose name becomes their `key`"))
    elif len(document) > 1 and are_alike(list(document.values())):
        found.append(("*", f"each of its {len(document):,} entries is a row, whose name becomes its `key`"))
    lists.sort(key=lambda place: (rank_of(place[0]), -place[1]))
    for name, count in lists[: 1 if found else MOST_PLACES]:
        others = [f"{other} ({size:,})" for other, size in lists if other != name]
        beside = f"; others are in {', '.join(others[:MOST_LISTED])}" if others else ""
        more = f" and {len(others) - MOST_LISTED:,} more" if len(others) > MOST_LISTED else ""
        found.append((name, f"{count:,} rows stand in '{name}'{beside}{more}"))
    return [(None, "it is one record"), *found]


def are_alike(values: list[Any]) -> bool:
    """Whether all are mappings, and most have the keys of the first."""
    if not all(isinstance(value, dict) and value for value in values):
        return False
    return sum(value.keys() == values[0].keys() for value in values) > len(values) / 2


def read_whole(path: Path, encoding: str | None) -> Any:
    content = bytearray()
    for block in text_blocks(path, encoding):
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            return None
    return Document(bytes(content).removeprefix(UTF8_MARK)).value


def lists_below(document: dict[str, Any], above: str, depth: int) -> Iterator[tuple[str, int]]:
    """(names with dots between, length) of each list of mappings or lists."""
    for name, value in document.items():
        if not name or "." in name or name == "*":
            continue  # `records` cannot name it
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            yield f"{above}{name}", len(value)
        elif isinstance(value, dict) and depth > 1:
            yield from lists_below(value, f"{above}{name}.", depth - 1)


def is_split(name: str) -> bool:
    return name.lower().split("_")[-1] in SPLITS


def rank_of(name: str) -> int:
    """The place among `SPLITS` of a name or of what it ends with; parts such as `oos_train` come after all plain ones."""
    last = name.rpartition(".")[2].lower()
    if last in SPLITS:
        return SPLITS.index(last)
    return len(SPLITS) + (SPLITS.index(last.split("_")[-1]) if is_split(last) else len(SPLITS))
