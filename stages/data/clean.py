"""The stage `clean`: reads one source, and keeps the rows that are whole, good enough and not said before."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.settings.strict import Inlined, Strict
from pipeline.stage import Context, Forecast, Result, Stage
from pipeline.store.artifact import Facts, Kind
from stages.lib.curation.agreement import CONTRADICTING, Agreement, shown_beside
from stages.lib.curation.control_characters import notice_control_characters
from stages.lib.curation.filters import Filters, build_judge
from stages.lib.curation.label_forms import LabelForms
from stages.lib.curation.near_duplicates import MinHash, choose_buckets, near_clusters, near_duplicates
from stages.lib.curation.normalization import Normalization, normalize_row
from stages.lib.curation.rule_params import Rules, misplaced_rules
from stages.lib.curation.rules import Ruled, Ruling, build_rules, count_ruled
from stages.lib.curation.wholeness import alike, emptied
from stages.lib.rows.canonical import FORMATS, FormatName, Row, content_digest, encode_row, judged_text
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.layouts import layouts_giving
from stages.lib.sources.params import FilesSource, Source


class CleanParams(Strict):
    """One source of rows, and what becomes of them before they are mixed."""

    format: FormatName
    """What the rows are. The source's layout must give this format."""
    source: Inlined[Source]
    """Where the rows come from: a block, or the path of a YAML file in data_recipes/ that holds it."""
    normalization: Inlined[Normalization] | None = Normalization()
    """What is made uniform in texts, before anything else looks at them. null: nothing. Spans and questions are never rewritten."""
    rules: Rules = []
    """What is dropped and rewritten by rule, after normalization and before the filters, in this order: data_recipes/README.md shows each kind. A row is counted by the first rule that drops it, and by each that rewrites it."""
    filters: Inlined[Filters] = Filters()
    """What a row's text must be like. By default only empty texts go; quality and repetition suit web text and are off."""
    drop_exact_duplicates: bool = True
    """Whether of rows that say exactly the same only the first is kept. One that has another margin, or carries other columns, is counted apart, as contradicts_earlier_row."""
    drop_contradicting: bool = False
    """Whether to drop all rows that contradict each other: the same text with two labels, other spans or other answers, a pair of preferences both ways round or with two margins, a prompt with two sets of carried columns. If not, they are counted (rows_contradicting) and told."""
    minhash: Inlined[MinHash] | None = None
    """Near-duplicates to drop; {} takes the defaults. null: none are looked for."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most rows to keep: those with the smallest hash of their content, which is a fair and repeatable sample. null: all."""

    @model_validator(mode="after")
    def check_format(self) -> CleanParams:
        given = self.source.given_format
        if given not in (None, self.format):
            raise ValueError(
                f"source: the layout {self.source.layout} gives {given}, and format is {self.format}. Set format: {given}, "
                f"or a layout that gives {self.format}: {', '.join(layouts_giving(self.format))}."
            )
        if not FORMATS[self.format].rewritten and self.normalization not in (None, Normalization()):
            raise ValueError(f"normalization: {self.format} are never rewritten, because their offsets would move.")
        return self


def output_kind(params: CleanParams, inputs: Mapping[str, Kind]) -> Kind:
    return FORMATS[params.format].rows_kind


def check(forecast: Forecast) -> list[Problem]:
    """Files whose type cannot be told, options that none of the files uses, and rules that are not for the format."""
    params = forecast.params
    found = [
        replace(problem, where=f"params.rules.{problem.where}")
        for problem in misplaced_rules(params.rules, params.format)
    ]
    try:
        if isinstance(params.source, FilesSource):
            params.source.files()
    except DataError as error:
        problems = [problem for problem in error.problems if isinstance(problem, Problem)]
        found += [replace(problem, where=f"params.source: {problem.where}") for problem in problems]
    return found


def run(ctx: Context, params: CleanParams) -> Result:
    ledger = Ledger()
    scratch = ctx.work / "clean"
    scratch.mkdir(exist_ok=True)
    candidates = scratch / "candidates.jsonl"
    ruling = Ruling(params.rules)
    agreement = Agreement(params.format)
    count = write_candidates(candidates, ctx, params, ledger, ruling, agreement)
    ctx.journal.note(f"read {ledger.read:,} rows; {count:,} are whole, pass rules and filters and are said once")
    if params.drop_contradicting:
        drop_contradicting(candidates, agreement, ledger)
    near = find_near_duplicates(candidates, scratch / "minhash", ctx, params)
    left_out = beyond_max_rows(candidates, near, params)
    characters = write_kept(ctx.out / "rows.jsonl", candidates, near, left_out, params, ledger, agreement)
    candidates.unlink()
    if not ledger.kept:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in ledger.dropped.most_common())
        raise DataError(
            Problem(
                "source",
                f"no row of {ledger.read:,} is left ({reasons})",
                "Look at the source's layout, columns and carry, and at the rules and filters.",
            )
        )
    ledger.write(ctx.out)
    report(ctx, ledger, ruling)
    contradicting = ledger.noticed[CONTRADICTING]
    told = {"rows_contradicting": float(contradicting)} if contradicting else {}
    metrics = {**ledger.metrics(), **told, "characters_kept": float(characters)}
    return Result(metrics, Facts(dropped_rows=dict(sorted(ledger.dropped.items()))))


STAGE = Stage(
    kind="clean",
    version=10,
    summary="Reads one source and keeps the rows that are whole, good enough and not said before.",
    params=CleanParams,
    inputs={},
    output=output_kind,
    run=run,
    check=check,
)


def write_candidates(
    path: Path, ctx: Context, params: CleanParams, ledger: Ledger, ruling: Ruling, agreement: Agreement
) -> int:
    """Writes (where, row) of every row that passes rules, filters and exact deduplication; returns how many."""
    from stages.lib.sources.read import read_source

    verdict = build_verdict(params)
    count = 0
    with path.open("wb") as file:
        for where, raw in read_source(params.source, params.format, ledger):
            notice_control_characters(ledger, where, raw, params.format, params.normalization)
            ruled, reason = verdict(raw)
            ruling.add(where, ruled)
            text = judged_text(ruled.row, params.format)
            if reason:
                ledger.drop(reason, f"{where}: {text}")
                continue
            agreement.learn(ruled.row)
            if params.drop_exact_duplicates and (reason := agreement.repeats(ruled.row)):
                contradicts = params.drop_contradicting and agreement.is_contradicted(ruled.row)
                drop_repeated(ledger, "contradicting" if contradicts else reason, where, ruled.row, params.format)
                continue
            candidate = [where, ruled.row, [*ruled.rewritten_by], ruled.not_judged_by]
            file.write(json.dumps(candidate, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            count += 1
            if count % 10_000 == 0:
                ctx.journal.write("progress", done=count, what="rows that pass the filters")
    return count


def build_verdict(params: CleanParams) -> Callable[[Row], tuple[Ruled, str | None]]:
    """A function of a row from the source: what normalization and rules make of it, and why it is dropped, or None."""
    judge = build_judge(params.filters)
    rules = build_rules(params.rules, params.format)

    def verdict(raw: Row) -> tuple[Ruled, str | None]:
        row = normalize_row(raw, params.format, params.normalization)
        if reason := emptied(row):
            return Ruled(row), reason
        ruled = rules(row)
        if ruled.dropped_by:
            return ruled, f"rule_{ruled.dropped_by}"
        if ruled.rewritten_by:
            ruled.row = normalize_row(ruled.row, params.format, params.normalization)
        # No fault of the source: `max_broken_fraction` does not count it.
        reason = "emptied_by_rule" if emptied(ruled.row) else alike(ruled.row)
        return ruled, reason or judge(judged_text(ruled.row, params.format))

    return verdict


class Candidate(NamedTuple):
    """A row that is whole, passes rules and filters, and is said once."""

    where: str
    row: Row
    rewritten_by: list[str]
    not_judged_by: list[str]


def read_candidates(path: Path) -> Iterator[Candidate]:
    with path.open("rb") as file:
        for line in file:
            yield Candidate(*json.loads(line))


def drop_repeated(ledger: Ledger, reason: str, where: str, row: Row, format: str) -> None:
    """Counts a row that says what another one says, with what it says besides where that is what tells them apart."""
    beside = "" if reason == "exact_duplicate" else f"{shown_beside(row, format)}: "
    ledger.drop(reason, f"{where}: {beside}{judged_text(row, format)}")


def drop_contradicting(candidates: Path, agreement: Agreement, ledger: Ledger) -> None:
    """Takes every row out of the candidates that another one contradicts."""
    if not agreement.contradicted:
        return
    rest = candidates.with_suffix(".rest")
    with candidates.open("rb") as file, rest.open("wb") as out:
        for line in file:
            each = Candidate(*json.loads(line))
            if agreement.is_contradicted(each.row):
                drop_repeated(ledger, "contradicting", each.where, each.row, agreement.format)
            else:
                out.write(line)
    rest.replace(candidates)


def find_near_duplicates(candidates: Path, scratch: Path, ctx: Context, params: CleanParams) -> set[int]:
    """Positions of the candidates that are nearly the same as an earlier one."""
    minhash = params.minhash
    if minhash is None:
        return set()
    buckets = choose_buckets(minhash)
    similar = min(1.0, minhash.similarity + 0.2)
    ctx.journal.note(
        f"near-duplicates: {buckets.count} buckets of {buckets.hashes} hashes find {buckets.chance(minhash.similarity):.0%} "
        f"of pairs with similarity {minhash.similarity:.2f} and {buckets.chance(similar):.1%} of those with {similar:.2f}"
    )
    texts = (judged_text(each.row, params.format) for each in read_candidates(candidates))
    clusters = near_clusters(texts, minhash, scratch)
    # Prompts share a passage more often than not, and what their answers are compared with tells them apart.
    beside = "columns" if params.format == "prompts" else ""
    parts = ((FORMATS[params.format].parts(each.row), each.row.get(beside)) for each in read_candidates(candidates))
    return near_duplicates(clusters, parts, minhash.similarity)


def beyond_max_rows(candidates: Path, near: set[int], params: CleanParams) -> set[int]:
    """Positions of the candidates that `max_rows` leaves out: all but those with the smallest hash of their content."""
    if params.max_rows is None:
        return set()
    hashed = [
        (content_digest(each.row, params.format), position)
        for position, each in enumerate(read_candidates(candidates))
        if position not in near
    ]
    kept = {position for _, position in heapq.nsmallest(params.max_rows, hashed)}
    return {position for _, position in hashed} - kept


def write_kept(
    path: Path,
    candidates: Path,
    near: set[int],
    left_out: set[int],
    params: CleanParams,
    ledger: Ledger,
    agreement: Agreement,
) -> int:
    """Writes the rows that are kept, in the order of the source; returns their characters."""
    characters = 0
    forms = LabelForms()
    with path.open("wb") as file:
        for position, (where, row, *ruled) in enumerate(read_candidates(candidates)):
            text = judged_text(row, params.format)
            contradicted = agreement.is_contradicted(row)
            if position in near:
                reason = "contradicts_earlier_row" if contradicted else "near_duplicate"
                drop_repeated(ledger, reason, where, row, params.format)
            elif position in left_out:
                ledger.drop("over_max_rows", f"{where}: {text}")
            else:
                file.write(encode_row(row))
                forms.add(row)
                ledger.kept += 1
                count_ruled(ledger, *ruled)
                if contradicted:
                    ledger.notice(CONTRADICTING, f"{where}: {shown_beside(row, params.format)}: {text}")
                characters += len(text)
    for note in forms.notes():
        ledger.notice(note)
    return characters


def report(ctx: Context, ledger: Ledger, ruling: Ruling) -> None:
    """Tells the user what was kept and why the rest was not."""
    ctx.journal.note(f"kept {ledger.kept:,} of {ledger.read:,} rows ({ledger.kept / ledger.read:.1%})")
    for reason, count in ledger.dropped.most_common():
        example = " ".join(ledger.examples[reason][0][:100].split())
        ctx.journal.note(f"dropped {count:,}: {reason} (for example {example})")
    for reason, count in ledger.repaired.most_common():
        ctx.journal.note(f"repaired {count:,}: {reason}")
    for what, count in ledger.noticed.most_common():
        examples = "".join(
            f" (for example {' '.join(each[:160].split())})" for each in ledger.noticed_examples.get(what, [])[:1]
        )
        ctx.journal.note(f"{count:,} rows: {what}{examples}")
    for note in ruling.notes():
        ctx.journal.note(note)
    if damaged := ledger.dropped["damaged_file"]:
        ctx.journal.note(
            f"{damaged:,} files break off, and what stood after is lost: {'; '.join(ledger.examples['damaged_file'])}"
        )
