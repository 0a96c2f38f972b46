"""`journal.jsonl`: what a stage says while it runs, one JSON object a line. Only rank 0 writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store.durable import write_text
from pipeline.store.numbers import json_text, not_finite, without


class Journal:
    """Events of one step's run: `{"event": "step", "step": 120, "loss": 2.31, ...}`.

    The events of a stage: `step` (training), `rollout` (completions of a policy and what was learned from them),
    `heldout` (held-out metrics at a step), `progress` (anything else that counts up: `done` of `total`), `note` (a
    sentence), `resume` (what was restored).

    A number that is not finite stands in an event as null, and `not_finite` says what it was: `{"loss": "nan"}`.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.is_torn = writes and ends_within_a_line(path)

    def write(self, event: str, **fields: Any) -> None:
        if not self.writes:
            return
        line: dict[str, Any] = {"event": event, "time": round(time.time(), 3), **fields}
        if odd := dict(not_finite(line)):
            line = {**without(line), "not_finite": odd}
        text = json_text(line, self.path.name)
        begun, self.is_torn = self.is_torn, True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n" if begun else f"{text}\n")
        self.is_torn = False

    def note(self, sentence: str) -> None:
        """A sentence for the user, shown on the console."""
        self.write("note", text=sentence)

    def events(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """What has been written so far, oldest first; a torn last line is passed over."""
        yield from (line for line in read_journal(self.path) if event is None or line["event"] == event)

    def rewind(self, step: int) -> None:
        """Drops what was written after training step `step`, so that a resumed run does not count it twice."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line in read_journal(self.path) if not is_after(line, step)]
        write_text(self.path, "".join(json_text(line, self.path.name) + "\n" for line in kept))
        self.is_torn = False


@dataclass
class JournalTail:
    """Reads a journal while it is written: each time what is new."""

    path: Path
    position: int = 0
    """Bytes that have been read."""
    inode: int | None = None
    was_rewound: bool = False
    """Whether the file was replaced or cut before the last reading, which then began at its beginning again."""

    def read(self) -> list[dict[str, Any]]:
        """The events that were completed since last time; none if there is no such file."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                self.was_rewound = self.position > 0 and (found.st_ino != self.inode or found.st_size < self.position)
                self.inode = found.st_ino
                self.position = 0 if self.was_rewound else self.position
                file.seek(self.position)
                data = file.read()
        except OSError:
            return []
        whole = data.rfind(b"\n") + 1
        self.position += whole
        return [event for line in data[:whole].splitlines() if (event := read_event(line))]


def ends_within_a_line(path: Path) -> bool:
    """Whether a process died, or a disk was full, within the last line: the next would be lost with it."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def is_after(event: dict[str, Any], step: int) -> bool:
    at = event.get("step", 0)
    return isinstance(at, int | float) and at > step


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's events; none if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if event := read_event(line):
                yield event


def read_event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None if there is none in it, as in a torn or damaged one."""
    try:
        event = without(json.loads(line))  # 1e999 and NaN are read as numbers, and are none
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
