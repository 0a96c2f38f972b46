"""`ledger.json`: how many rows were read and kept, and for each reason how many were dropped, with examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.store.numbers import json_text

MAX_EXAMPLES = 5


MAX_EXAMPLE_CHARACTERS = 200


@dataclass
class Ledger:
    """read = kept + all that was dropped. `repaired` counts rows (or parts of rows) that were mended and kept."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    repaired: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    """What the user should know of rows that were kept as they are, in words -> how many rows."""
    noticed_examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of them, of what has examples."""

    unclear: list[Problem] = field(default_factory=list)
    """What a source must say before its rows can be trusted; no part of the file."""

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Counts dropped rows, and keeps the first examples (cut to 200 characters)."""
        self.dropped[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(printable(example))

    def notice(self, what: str, *examples: str, count: int = 1) -> None:
        """Counts rows that are kept as they are, and keeps the first examples (cut to 200 characters)."""
        self.noticed[what] += count
        kept = self.noticed_examples.setdefault(what, [])
        kept += map(printable, examples[: MAX_EXAMPLES - len(kept)])

    def why_dropped(self) -> str:
        """The reasons in a sentence, the largest first, with an example each."""
        said = []
        for reason, count in largest_first(self.dropped):
            examples = self.examples.get(reason)
            said.append(f"{count:,} {reason}" + (f" (for example {examples[0][:80]!r})" if examples else ""))
        return ", ".join(said)

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": {
                reason: {"count": self.dropped[reason], "examples": self.examples.get(reason, [])}
                for reason in sorted(self.dropped)
            },
            "repaired": dict(sorted(self.repaired.items())),
            **({"noticed": dict(sorted(self.noticed.items()))} if self.noticed else {}),
            **({"noticed_examples": dict(sorted(self.noticed_examples.items()))} if self.noticed_examples else {}),
        }

    def write(self, folder: Path) -> None:
        text = json_text(self.as_json(), "ledger.json", indent=1)
        (folder / "ledger.json").write_text(text + "\n", encoding="utf-8")

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the manifest, the largest first."""
        counts = {f"dropped_{reason}": count for reason, count in largest_first(self.dropped)}
        counts |= {f"repaired_{reason}": count for reason, count in largest_first(self.repaired)}
        return {
            name: float(count) for name, count in {"rows_read": self.read, "rows_kept": self.kept, **counts}.items()
        }


def largest_first(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def printable(example: str) -> str:
    """The first 200 characters; what UTF-8 cannot hold is escaped."""
    return example[:MAX_EXAMPLE_CHARACTERS].encode("utf-8", "backslashreplace").decode()[:MAX_EXAMPLE_CHARACTERS]


def add_ledgers(first: Ledger, second: Ledger) -> Ledger:
    """Both together, with the examples of the first before those of the second."""
    both = Ledger(first.read + second.read, first.kept + second.kept)
    both.unclear = [*first.unclear, *second.unclear]
    both.repaired, both.noticed = first.repaired + second.repaired, first.noticed + second.noticed
    for ledger in (first, second):
        for what, kept in ledger.noticed_examples.items():
            both.notice(what, *kept, count=0)
        for reason, count in ledger.dropped.items():
            examples = ledger.examples[reason]
            for example in examples:
                both.drop(reason, example)
            both.dropped[reason] += count - len(examples)
    return both
