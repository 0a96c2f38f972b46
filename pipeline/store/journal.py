"""`journal.jsonl`: what a stage says while it runs, one JSON object a line. Only rank 0 writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Events of one step's run: `{"event": "step", "step": 120, "loss": 2.31, ...}`.

    The events of a stage: `step` (training), `rollout` (completions of a policy and what was learned from them),
    `heldout` (held-out metrics at a step), `progress` (anything else that counts up: `done` of `total`), `note` (a
    sentence), `resume` (what was restored).
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes

    def write(self, event: str, **fields: Any) -> None:
        if not self.writes:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

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
        kept = [line for line in read_journal(self.path) if line.get("step", 0) <= step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's events; none if there is no file."""
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue
