"""Sources that may read what lies at a path, ranked by what they make of a sample of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, product
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.conversion import REASONS
from stages.lib.sources.layouts import LAYOUTS, Layout
from stages.lib.sources.lines import Broken, Record
from stages.lib.sources.params import LaidOutSource
from stages.lib.sources.proposing.columns import TEXTS, WORDS, Column, columns_of, token_options
from stages.lib.sources.proposing.forms import CARRIED, GROUPS, Form, Matched, forms_of, plain_name
from stages.lib.sources.proposing.looking import ReaderChoice
from stages.lib.sources.proposing.matching import answers_both_ways, match, renames, unnamed
from stages.lib.sources.proposing.places import source_of
from stages.lib.sources.read import convert_records, read_records

EQUALLY_GOOD = 0.05
"""Proposals whose scores differ by less are shown side by side."""
LEAST_FIT = 0.05
"""Share of the rows that must convert, or at least have the layout's form, for it to be proposed."""

MOST_SENTENCES = 3
MOST_CHARACTERS = 32 << 20
"""Of a sample, as Python writes it: rows may be books."""

PARTS_OF_A_FILE = frozenset({"records", "split_text"})
"""Options that only say which rows a file has."""

STRUCTURAL = frozenset(
    "bad_json not_a_record not_utf8 bad_csv_row bad_conll_row missing_field wrong_type unknown_role no_assistant_turn bad_tag".split()
)
"""Reasons that speak against the layout; others speak against the row, which is then of the layout's form all the same."""
ONLY_IN_FORM = 0.6
"""What a row counts that has the layout's form and cannot be used."""


@dataclass(frozen=True)
class SampledRecords:
    """The first records as one choice of reader options gives them."""

    block: dict[str, Any]
    """The source's fields, without its layout."""
    records: list[Record | Broken]
    why: list[str]
    likelihood: float = 1.0

    @cached_property
    def rows(self) -> list[Row]:
        return [record.row for record in self.records if isinstance(record, Record)]

    @cached_property
    def columns(self) -> list[Column]:
        return columns_of(self.rows)


@dataclass
class Proposal:
    """A source, what it makes of the sample, and why it is proposed."""

    source: LaidOutSource
    block: dict[str, Any]
    """The source's fields as a recipe has them."""
    sample: SampledRecords
    matched: Matched
    ledger: Ledger
    rows: list[tuple[str, Row]]
    read_share: float
    specificity: float
    why: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str:
        return self.source.layout

    @property
    def format(self) -> str:
        return self.source.laid_out.format

    @property
    def num_in_form(self) -> int:
        """Rows that are dropped and have the layout's form all the same."""
        return sum(count for reason, count in self.ledger.dropped.items() if reason not in STRUCTURAL)

    @property
    def fit(self) -> float:
        """The share of the rows that convert. One that is dropped as it should be counts like them, one that has the form and
        is broken less.
        """
        dropped = self.ledger.dropped.items()
        broken = sum(count for reason, count in dropped if reason not in STRUCTURAL and REASONS[reason].broken)
        whole = len(self.rows) + self.num_in_form - broken
        return (whole + ONLY_IN_FORM * broken) / max(self.ledger.read, 1)

    @property
    def score(self) -> float:
        """From 0 to 1: rows that convert, times what is read, how well its columns are known and how special its form is."""
        known = 0.5 * self.read_share + 0.3 * self.matched.strength + 0.2 * self.specificity
        return self.sample.likelihood * self.fit * known


def sample_of(block: Mapping[str, Any], choice: ReaderChoice, num_rows: int) -> SampledRecords:
    """The first `num_rows` records, or as many as fit into memory. Raises `DataError` where they cannot be read."""
    chosen = {**block, **choice.options}
    records: list[Record | Broken] = []
    characters = 0
    for record in islice(read_records(source_of({**chosen, "layout": "text"})), num_rows):
        records.append(record)
        characters += len(repr(record))
        if characters > MOST_CHARACTERS:
            break
    return SampledRecords(chosen, records, choice.why, choice.likelihood)


def proposals_for(
    samples: Sequence[SampledRecords],
    given: Mapping[str, Any],
    *,
    layout: str | None = None,
    format: str | None = None,
) -> list[Proposal]:
    """What may read the samples, the best first; of those that give the same rows only the best. At the end stand those that
    fit by their columns and convert no row: `fit` tells.

    `given` are fields of the source that somebody has decided.
    """
    layouts = [name for name, known in LAYOUTS.items() if layout in (None, name) and format in (None, known.format)]
    found = [
        proposal
        for sample in samples
        for name in layouts
        for form in forms_of(name)
        for proposal in tried(sample, form, given)
    ]
    # Sorting is stable: of equal ones the likelier choice of the reader's options comes first.
    found.sort(key=lambda proposal: -round(proposal.score, 6))
    return list(distinct(found))


def distinct(proposals: Sequence[Proposal]) -> Iterator[Proposal]:
    """Without those that say the same as one before them, or read another part of the same file in the same way."""
    seen = set()
    for proposal in proposals:
        rows = [row for _, row in proposal.rows]
        how = {name: value for name, value in proposal.block.items() if name not in PARTS_OF_A_FILE}
        contents = {
            json.dumps([proposal.format, each], sort_keys=True, default=str, allow_nan=False)
            for each in (rows, how)
            if each
        }
        if not contents & seen:
            yield proposal
        seen |= contents


def equally_good(proposals: Sequence[Proposal]) -> list[Proposal]:
    """The best one, and those that are as good."""
    return [each for each in proposals if proposals[0].score - each.score < EQUALLY_GOOD]


def tried(sample: SampledRecords, form: Form, given: Mapping[str, Any]) -> Iterator[Proposal]:
    """The form with the columns that it may have, with each of the options that may be right."""
    columns = list(unnamed(sample.columns))
    if not can_have(LAYOUTS[form.layout], given):
        return
    matched = match(form, columns, given.get("columns", {}), len(sample.rows))
    if matched.missing:
        return
    ways = product(options_for(form, matched, sample.columns, given), answers_both_ways(matched, sample.columns, given))
    for (options, why), (way, more, told) in ways:
        block = {**sample.block, "layout": form.layout}
        names = {
            **renames(way, [column.name for column in sample.columns]),
            **group_of(sample.columns, matched, len(sample.rows)),
        }
        block |= {"columns": names} if names else {}
        block |= {**options, **more}
        block |= {name: value for name, value in given.items() if name != "columns"}
        source = source_of(block)
        ledger = Ledger()
        rows = list(convert_records(sample.records, source, ledger))
        read, special = read_share(columns, matched, options), specificity(matched, sample.columns)
        reasoned = [*sample.why, *reasons(way, sample.columns), *why, *told]
        yield Proposal(source, block, sample, way, ledger, rows, read, special, reasoned)


def can_have(layout: Layout, given: Mapping[str, Any]) -> bool:
    """Whether the layout has the columns and options that somebody has decided."""
    options = {name for each in LAYOUTS.values() for name in each.options}
    return given.get("columns", {}).keys() <= {*layout.columns, "id", "group"} and not (given.keys() & options) - {
        *layout.options
    }


def options_for(
    form: Form, matched: Matched, columns: Sequence[Column], given: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """(options of the source, why) that fit what the columns hold, the likeliest first."""
    layout = LAYOUTS[form.layout]
    by_name = {column.name: column for column in columns}
    held = [by_name[name] for name in matched.columns.values() if name in by_name]
    options: dict[str, Any] = {}
    why: list[str] = []
    if "token_separator" in layout.options and (tokens := by_name.get(matched.columns["tokens"])):
        for option, value, reason in token_options(tokens):
            if option in layout.options and option not in given:
                options[option] = value
                why.append(reason)
    if form.layout == "prompts" and (carry := carried(columns, matched)) and "carry" not in given:
        options["carry"] = [carry]
        why.append(f"'{carry}' is carried along, for rewards that compare a completion with it")
    kinds = {column.kind for column in held}
    if "turns_in_text" not in layout.options or "turns_in_text" in given:
        yield options, why
        return
    if "transcript" in kinds:
        yield {**options, "turns_in_text": "transcript"}, [*why, "texts hold turns of Human: and Assistant:"]
    elif "turns_json" in kinds:
        yield {**options, "turns_in_text": "json"}, [*why, "texts hold lists of turns as JSON"]
    else:
        yield options, why
        if "turn_json" in kinds:
            yield (
                {**options, "turns_in_text": "json"},
                [*why, "if its texts that are JSON are turns, and no answers in JSON"],
            )


def carried(columns: Sequence[Column], matched: Matched) -> str | None:
    """The column, or what lies within one, that a completion is to be compared with; None where there is none."""
    taken = set(matched.columns.values())
    for name in CARRIED:
        outer, _, inner = name.partition(".")
        for column in columns:
            if column.name in taken or column.name != outer:
                continue
            if not inner and column.kind in ("text", "number", "binary", "truth", "truth_text"):
                return name
            if (
                inner
                and column.kind == "mapping"
                and all(isinstance(value.get(inner), str | int | float) for value in column.values)
            ):
                return name
    return None


def group_of(columns: Sequence[Column], matched: Matched, num_rows: int) -> dict[str, str]:
    """The column whose rows belong together, if every row has it."""
    for column in columns:
        names_things = column.kind in ("text", "number") and column.filled == num_rows
        if column.name not in matched.columns.values() and plain_name(column.name) in GROUPS and names_things:
            return {"group": column.name}
    return {}


def read_share(columns: Sequence[Column], matched: Matched, options: Mapping[str, Any]) -> float:
    """The share of the columns that are read, from 0 to 1: what has a form of its own counts twice, and half as much where
    it is only read as text; what is only carried counts half.
    """
    whole = {name for ours, name in matched.columns.items()}
    carried_names = {name.partition(".")[0] for name in options.get("carry", [])}
    total = read = 0.0
    for column in columns:
        weight = 2.0 if column.is_structure else 1.0
        if plain_name(column.name) in GROUPS:
            continue
        total += weight
        if column.name in whole:
            as_text = column.kind == "pieces" and matched.form.layout != "pieces"
            read += weight / 2 if as_text else weight
        elif column.name in carried_names:
            read += weight / 2
    return read / total if total else 1.0


def specificity(matched: Matched, columns: Sequence[Column]) -> float:
    """From 0 to 1: how many columns the form needs, those with a form of their own twice."""
    by_name = {column.name: column for column in columns}
    needed = [by_name.get(matched.columns.get(slot.ours, "")) for slot in matched.form.needed]
    structured = sum(
        column is not None and column.is_structure and not (column.kind == "pieces" and matched.form.layout == "label")
        for column in needed
    )
    return min(len(needed) + structured, 4) / 4


def reasons(matched: Matched, columns: Sequence[Column]) -> list[str]:
    """What each column holds that the layout reads."""
    by_name = {column.name: column for column in columns}
    told = []
    for ours, theirs in matched.columns.items():
        if theirs in by_name:
            known = "" if ours == theirs else f" and stands for {ours}"
            told.append(f"'{theirs}' holds {WORDS[by_name[theirs].kind]}{known}")
    return told


def nearest_layouts(
    samples: Sequence[SampledRecords],
    unfit: Sequence[Proposal],
    *,
    layout: str | None = None,
    format: str | None = None,
) -> list[str]:
    """Of data that no layout fits: what the layouts that come nearest lack. `unfit` have the columns, and no row converts."""
    found = [(1.0, sentence_of_rows(proposal)) for proposal in unfit if proposal.ledger.dropped]
    for sample in samples:
        columns = list(unnamed(sample.columns))
        for name, known in LAYOUTS.items():
            if layout not in (None, name) or format not in (None, known.format):
                continue
            for form in forms_of(name):
                matched = match(form, columns, {}, len(sample.rows))
                share = 1 - len(matched.missing) / max(len(form.needed), 1)
                if matched.missing and (share > 0 or layout is not None):
                    found.append((share, sentence_of_columns(form, matched, columns)))
    found.sort(key=lambda each: -each[0])
    return list(dict.fromkeys(sentence for _, sentence in found))[:MOST_SENTENCES]


def sentence_of_rows(proposal: Proposal) -> str:
    reason, count = proposal.ledger.dropped.most_common(1)[0]
    example = proposal.ledger.examples[reason][0]
    rows = f"{count:,} of {proposal.ledger.read:,} rows are dropped"
    return f"{proposal.layout}: {rows} as {reason}, for example {example}"


def sentence_of_columns(form: Form, matched: Matched, columns: Sequence[Column]) -> str:
    lacks = []
    for slot in matched.missing:
        named = next((column for column in columns if plain_name(column.name) in (slot.ours, *slot.names)), None)
        kinds = " or ".join(WORDS[kind] for kind in sorted(slot.holds) if kind == "text" or kind not in TEXTS)
        if named is not None and named.kind not in slot.holds:
            lacks.append(f"'{named.name}' holds {WORDS[named.kind]}, and {slot.ours} takes {kinds}")
        else:
            others = f", which others call {', '.join(slot.names[:4])}" if slot.names else ""
            lacks.append(f"no column for {slot.ours} ({kinds}{others})")
    return f"{form.layout}: {'; '.join(lacks)}"
