"""Data from outside: which source reads it, and what `clean` would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.curation.agreement import CONTRADICTING, Agreement, shown_beside
from stages.lib.curation.control_characters import notice_control_characters
from stages.lib.curation.label_forms import LabelForms
from stages.lib.curation.normalization import Normalization, normalize_row
from stages.lib.curation.wholeness import alike, emptied
from stages.lib.inspecting.row_views import Part, parts_of_row, spread
from stages.lib.inspecting.token_views import ModelView
from stages.lib.rows.canonical import Row, judged_text
from stages.lib.rows.ledger import MAX_EXAMPLES, Ledger, largest_first
from stages.lib.sources.conversion import REASONS, REPAIRS
from stages.lib.sources.lines import Broken, Record
from stages.lib.sources.params import FilesSource, LaidOutSource
from stages.lib.sources.proposing.columns import WORDS, Column
from stages.lib.sources.proposing.places import readings_of
from stages.lib.sources.proposing.proposals import (
    LEAST_FIT,
    Proposal,
    SampledRecords,
    equally_good,
    nearest_layouts,
    proposals_for,
    sample_of,
)
from stages.lib.sources.proposing.scores import reversed_by_numbers
from stages.lib.sources.read import (
    convert_records,
    look_of,
    read_records,
    refuse_damaged_files,
    refuse_too_many_broken,
    refuse_unclear,
)

SAMPLE_RECORDS = 1000
"""Records by which proposals are judged."""

MOST_ALTERNATIVES = 3


ANSWERS = frozenset({"chosen", "rejected", "output", "output_1", "output_2"})
"""Our names of columns that say which answer is the better one."""


@dataclass(frozen=True)
class Asked:
    """What a user wants to know of data or rows."""

    layout: str | None = None
    format: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the source that the user has decided."""
    model: Path | None = None
    num_rows: int = SAMPLE_RECORDS
    """How many raw rows are read; 0: all."""
    num_shown: int = 3
    max_length_tokens: int | None = None


def inspect_data(names: Sequence[str], asked: Asked) -> dict[str, Any]:
    """What lies at the paths, the sources that read it, and what these make of it, as plain values.

    Raises `PathError` or `DataError` where nothing can be read.
    """
    block, choices, notes = readings_of(names, asked.given)
    samples, problems = [], []
    for choice in choices:
        try:
            samples.append(sample_of(block, choice, SAMPLE_RECORDS))
        except DataError as error:
            problems.append(error)
    if not samples:
        raise problems[0]
    samples = [sample for sample in samples if sample.records]
    if not samples:
        raise DataError(Problem(", ".join(names), "holds no rows", "Look at what stands below its header."))
    tried = proposals_for(samples, asked.given, layout=asked.layout, format=asked.format)
    fitting = [proposal for proposal in tried if proposal.fit >= LEAST_FIT]
    proposals, against = without_reversed(fitting, asked)
    # What stands in the way of the likeliest reading is told beside what another makes of the file.
    notes = [*notes, *(f"another reading is refused: {problem}" for error in problems for problem in error.problems)]
    report: dict[str, Any] = {"what": "data", "paths": list(names), "notes": [*notes, *against]}
    if not proposals:
        best = max(samples, key=lambda sample: len(sample.rows))
        return {**report, **without_proposal(best, samples, tried, asked)}
    best = equally_good(proposals)
    report["columns"] = [column_data(column) for column in best[0].sample.columns]
    view = ModelView(asked.model) if asked.model else None
    report["proposals"] = [proposal_data(each, asked, view) for each in best]
    report["also_fit"] = [
        {**summary_of(each), "why": each.why} for each in proposals[len(best) : len(best) + MOST_ALTERNATIVES]
    ]
    return report


def without_reversed(proposals: Sequence[Proposal], asked: Asked) -> tuple[list[Proposal], list[str]]:
    """The proposals without those whose pairs the data's own numbers turn round, unless the user names the layout or the
    columns of the answers; and what is to be said of them."""
    against = {
        index: sentence
        for index, each in enumerate(proposals)
        if (sentence := reversed_by_numbers(each.layout, each.matched.columns, each.sample.rows))
    }
    decided = asked.layout is not None or ANSWERS & asked.given.get("columns", {}).keys()
    what = "CAREFUL" if decided else "NOT PROPOSED"
    told = [f"{what}: layout {proposals[index].layout}: {sentence}" for index, sentence in against.items()]
    kept = [each for index, each in enumerate(proposals) if decided or index not in against]
    return kept, list(dict.fromkeys(told))


def without_proposal(
    best: SampledRecords, samples: Sequence[SampledRecords], unfit: Sequence[Proposal], asked: Asked
) -> dict[str, Any]:
    """Of data that no layout fits: its columns, and what is missing."""
    ledger = Ledger()
    for record in best.records:
        ledger.read += 1
        if isinstance(record, Broken):
            ledger.drop(record.reason, ": ".join(filter(None, [record.where, record.detail, record.snippet])))
        else:
            ledger.drop("no_layout", f"{record.where}: {record.row!r}")
    return {
        "columns": [column_data(column) for column in best.columns],
        "proposals": [],
        "missing": nearest_layouts(samples, unfit, layout=asked.layout, format=asked.format),
        "rows": {**counts_of(ledger), "complete": len(best.records) < SAMPLE_RECORDS},
    }


def column_data(column: Column) -> dict[str, Any]:
    return {"name": column.name, "holds": WORDS[column.kind], "filled": column.filled, "distinct": column.distinct}


def summary_of(proposal: Proposal) -> dict[str, Any]:
    return {
        "layout": proposal.layout,
        "format": proposal.format,
        "source": proposal.block,
        "score": round(proposal.score, 3),
        "of_sample": {
            "read": proposal.ledger.read,
            "converted": len(proposal.rows),
            "of_its_form": proposal.num_in_form,
        },
    }


def proposal_data(proposal: Proposal, asked: Asked, view: ModelView | None) -> dict[str, Any]:
    """The proposal and what `clean` with its defaults would make of the rows."""
    examined = Examined(proposal.source, view, asked)
    for where, row in examined.kept_rows():
        examined.look_at(where, row)
    return {**summary_of(proposal), "why": proposal.why, **examined.data()}


class Examined:
    """What becomes of the rows of a source."""

    def __init__(self, source: LaidOutSource, view: ModelView | None, asked: Asked) -> None:
        self.source, self.format = source, source.laid_out.format
        self.view, self.asked = view, asked
        self.ledger = Ledger()
        self.complete = True
        self.looks = RowLooks(self.format, view, asked)

    def records(self) -> Iterator[Record | Broken]:
        """As many as are asked for; one record may be many rows."""
        for record in read_records(self.source):
            if self.asked.num_rows and self.ledger.read >= self.asked.num_rows:
                self.complete = False
                return
            yield record

    def kept_rows(self) -> Iterator[tuple[str, Row]]:
        """The rows that `clean` keeps by default: whole ones, each content once."""
        agreement = Agreement(self.format)
        asked: Counter[bytes | None] = Counter()
        examples: list[str] = []
        forms = LabelForms()
        for where, raw in convert_records(self.records(), self.source, self.ledger):
            notice_control_characters(self.ledger, where, raw, self.format, Normalization())
            row = normalize_row(raw, self.format, Normalization())
            text = judged_text(row, self.format)
            if reason := emptied(row) or alike(row):
                self.ledger.drop(reason, f"{where}: {text}")
                continue
            agreement.learn(row)
            if agreement.is_contradicted(row) and len(examples) < MAX_EXAMPLES:
                examples.append(f"{where}: {shown_beside(row, self.format)}: {text}")
            if repeated := agreement.repeats(row):
                beside = "" if repeated == "exact_duplicate" else f"{shown_beside(row, self.format)}: "
                self.ledger.drop(repeated, f"{where}: {beside}{text}")
                continue
            self.ledger.kept += 1
            forms.add(row)
            asked[agreement.asked(row)] += 1
            yield where, row
        for note in forms.notes():
            self.ledger.notice(note)
        if contradicting := sum(asked[each] for each in agreement.contradicted):
            self.ledger.notice(CONTRADICTING, *examples, count=contradicting)

    def look_at(self, where: str, row: Row) -> None:
        self.looks.add(where, row)

    def data(self) -> dict[str, Any]:
        if self.ledger.dropped["not_utf8"] and (looks := look_of(self.source, self.ledger)):
            count = self.ledger.dropped["not_utf8"]
            self.ledger.noticed[f"dropped because they are no UTF-8: the file looks like encoding: {looks}"] += count
        found = {"rows": {**counts_of(self.ledger), "complete": self.complete}, **self.looks.data()}
        stops = self.stops()
        return {**found, "stops": stops} if stops else found

    def stops(self) -> list[str]:
        """Why `clean` would stop at these rows; nothing if it would not."""
        try:
            if isinstance(self.source, FilesSource):
                refuse_damaged_files(self.source, self.ledger)
            refuse_unclear(self.ledger)
            refuse_too_many_broken(self.source, self.ledger)
        except DataError as error:
            return [str(problem) for problem in error.problems[:1]]
        return [] if self.ledger.kept else ["no row is left"]


class RowLooks:
    """The first rows in full, and the lengths of all."""

    def __init__(self, format: str, view: ModelView | None, asked: Asked) -> None:
        self.format, self.view, self.asked = format, view, asked
        self.characters: list[int] = []
        self.tokens: list[int] = []
        self.refused: list[str] = []
        self.shown: list[dict[str, Any]] = []

    def add(self, where: str, row: Row) -> None:
        self.characters.append(len(judged_text(row, self.format)))
        shows = len(self.shown) < self.asked.num_shown
        parts: list[Part] = parts_of_row(row, self.format) if shows else []
        if self.view is not None:
            try:
                views = self.view.views_of(row, self.format)
                self.tokens.append(max(len(each.ids) for each in views))
                if shows:
                    parts = [self.view.part_of(each) for each in views]
            except DataError as error:
                self.refused.append(f"{where}: {error}")
        if shows:
            self.shown.append({"where": where, "row": row, "parts": parts})

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shown": self.shown, "characters": spread(self.characters)}
        if self.view is not None:
            found["tokens"] = spread(self.tokens)
            found["not_rendered"] = {"count": len(self.refused), "examples": self.refused[:2]}
            limit = self.asked.max_length_tokens
            if limit is not None:
                found["longer_than_max_length_tokens"] = sum(length > limit for length in self.tokens)
        return found


def counts_of(ledger: Ledger) -> dict[str, Any]:
    """read = kept + dropped, with the reasons, an example each, what was repaired, and what nothing reads."""
    dropped = sum(ledger.dropped.values())
    assert ledger.read == ledger.kept + dropped, (ledger.read, ledger.kept, ledger.dropped)
    return {
        "read": ledger.read,
        "kept": ledger.kept,
        "dropped": dropped,
        "reasons": [
            {"reason": reason, "count": count, "meaning": meaning_of(reason), "example": ledger.examples[reason][0]}
            for reason, count in largest_first(ledger.dropped)
        ],
        "repaired": [
            {"what": name, "count": count, "meaning": REPAIRS.get(name, "")}
            for name, count in largest_first(ledger.repaired)
        ],
        "noticed": [
            {"what": what, "count": count, **example_of(ledger.noticed_examples.get(what))}
            for what, count in largest_first(ledger.noticed)
        ],
    }


def example_of(examples: Sequence[str] | None) -> dict[str, str]:
    return {"example": examples[0]} if examples else {}


OTHER_MEANINGS = {
    "exact_duplicate": "says exactly what a row before it says",
    "contradicts_earlier_row": "says what a row before it says, and has another margin or carries other columns",
    "contradicting": "says what another row says, and is to teach something else",
    "no_layout": "fits no layout",
}


def meaning_of(reason: str) -> str:
    return REASONS[reason].meaning if reason in REASONS else OTHER_MEANINGS.get(reason, "")


def first_rows(rows: Iterator[tuple[str, Row]], num_rows: int) -> Iterator[tuple[str, Row]]:
    """As many rows as are asked for; 0: all."""
    return islice(rows, num_rows) if num_rows else rows
