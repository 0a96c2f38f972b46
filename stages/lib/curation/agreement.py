"""Which rows say what another row has said, and whether they agree with it in what is to be learned from them.

Of a pair of preferences the two answers are what it asks, and which of them is better is what it teaches: a pair the other
way round contradicts it. Of each row nothing but digests is kept in memory.
"""

from __future__ import annotations

from pipeline.store.artifact import canonical_json
from stages.lib.rows.canonical import FORMATS, Row, content_digest, digest_text

LEARNED: dict[str, tuple[str, ...]] = {
    "labels": ("label",),
    "spans": ("spans",),
    "questions": ("answers",),
    "preferences": ("chosen", "margin"),
    "unpaired_preferences": ("label",),
    "ratings": ("ratings",),
    "step_labels": ("labels",),
    "prompts": ("columns",),
}
"""Format -> what is to be learned from a row, or what its completions are compared with. Of other formats different rows may
stand beside each other: an answer does not contradict another one."""

BESIDE = ("margin", "columns")
"""What a row says besides its content."""

NOTHING_BESIDE = b""

CONTRADICTING = "say what another row says, and are to teach something else (drop_contradicting: true drops them all)"
"""What is told of rows that are kept."""


class Agreement:
    """What the rows of one format said so far."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.contradicted: set[bytes] = set()
        """`asked` of the rows that teach different things."""
        self._beside: dict[bytes, bytes] = {}
        self._taught: dict[bytes, bytes] = {}

    def repeats(self, row: Row) -> str | None:
        """`exact_duplicate` if a row before it says the same, `contradicts_earlier_row` if that one says something else
        besides: has another margin, or carries other columns."""
        said = [row.get(name) for name in BESIDE]
        beside = NOTHING_BESIDE if said == [None] * len(BESIDE) else digest_of(said)
        content = content_digest(row, self.format)
        if content not in self._beside:
            self._beside[content] = beside
            return None
        return "exact_duplicate" if self._beside[content] == beside else "contradicts_earlier_row"

    def asked(self, row: Row) -> bytes | None:
        """Equal for rows that ask the same, whatever they teach; None where nothing is taught."""
        learned = LEARNED.get(self.format)
        if learned is None or row.get(learned[0]) is None:
            return None
        known = FORMATS[self.format]
        if self.format == "preferences":
            asks = [row["prompt"], sorted_items([row["chosen"], row["rejected"]])]
        else:
            asks = [row.get(name) for name in (*known.fields, *known.optional) if name not in learned]
        return digest_of(asks)

    def learn(self, row: Row) -> None:
        """Takes the row to those that were said, and knows from then on whether they contradict each other."""
        asked = self.asked(row)
        if asked is None:
            return
        values = [row.get(name) for name in LEARNED[self.format]]
        in_any_order = self.format != "step_labels"
        taught = digest_of([sorted_items(each) if isinstance(each, list) and in_any_order else each for each in values])
        if self._taught.setdefault(asked, taught) != taught:
            self.contradicted.add(asked)

    def is_contradicted(self, row: Row) -> bool:
        """Whether a row was learned that asks the same and teaches something else."""
        return bool(self.contradicted) and self.asked(row) in self.contradicted


def shown_beside(row: Row, format: str) -> str:
    """What the row teaches or says beside its content, for examples."""
    names = (*LEARNED.get(format, ()), *BESIDE)
    shown = {name: row[name] for name in dict.fromkeys(names) if row.get(name) is not None}
    return canonical_json(shown).decode()[:120]


def sorted_items(values: list[object]) -> list[str]:
    return sorted(canonical_json(value).decode() for value in values)


def digest_of(value: object) -> bytes:
    return digest_text(canonical_json(value).decode())
