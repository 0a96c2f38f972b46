"""Labels that look alike and are different classes: capitals, invisible characters, numbers written in two ways."""

from __future__ import annotations

import unicodedata
from collections import Counter

from stages.lib.rows.canonical import Row

MOST = 10_000
"""Different labels that are compared; of more nobody reads which are alike."""


class LabelForms:
    """The labels of rows, and of the spans in them, as they are written."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        labels = [span["label"] for span in row.get("spans") or ()]
        if isinstance(row.get("label"), str):
            labels.append(row["label"])
        self.seen.update(label for label in labels if label in self.seen or len(self.seen) < MOST)

    def notes(self) -> list[str]:
        """A sentence for each group of labels that differ in form alone."""
        groups: dict[str, list[str]] = {}
        for label in self.seen:
            groups.setdefault(without_form(label), []).append(label)
        return [
            "labels that differ in capitals, spaces or invisible characters alone are classes of their own: "
            + ", ".join(f"{label!a} ({self.seen[label]:,})" for label in sorted(group))
            for group in groups.values()
            if len(group) > 1
        ]


def without_form(label: str) -> str:
    """What two forms of one label have in common."""
    visible = "".join(each for each in label if unicodedata.category(each) not in ("Cc", "Cf"))
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())
