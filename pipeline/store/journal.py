"""`journal.jsonl`: what a stage says while it runs, one JSON object a line. Only rank 0 writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        self.has_written = False

    def write(self, event: str, **fields: Any) -> None:
        if not self.writes:
            return
        line: dict[str, Any] = {"event": event, "time": round(time.time(), 3), **fields}
        if odd := dict(not_finite(line)):
            line = {**without(line), "not_finite": odd}
        text = json_text(line, self.path.name) + "\n"
        if not self.has_written and ends_torn(self.path):
            text = "\n" + text
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.has_written = True

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
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json_text(line, self.path.name) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def is_after(event: dict[str, Any], step: int) -> bool:
    at = event.get("step", 0)
    return isinstance(at, int | float) and at > step


def ends_torn(path: Path) -> bool:
    """Whether the last line was not written to its end, so that the next would be lost with it."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # none, or an empty one
        return False


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's events; none if there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
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
