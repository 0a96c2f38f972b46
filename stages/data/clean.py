"""The stage `clean`: reads one source, and keeps the rows that are whole, good enough and not said before."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.settings.strict import Inlined, Strict
from pipeline.stage import Context, Forecast, Result, Stage
from pipeline.store.artifact import Facts, Kind
from stages.lib.curation.filters import Filters, build_judge
from stages.lib.curation.near_duplicates import MinHash, choose_buckets, near_clusters, near_duplicates
from stages.lib.curation.normalization import Normalization, normalize_row
from stages.lib.rows.canonical import FORMATS, FormatName, Row, content_digest, encode_row, judged_text
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.params import FilesSource, Source


class CleanParams(Strict):
    """One source of rows, and what becomes of them before they are mixed."""

    format: FormatName
    """What the rows are. The source's layout must give this format."""
    source: Inlined[Source]
    """Where the rows come from: a block, or the path of a YAML file in data_recipes/ that holds it."""
    normalization: Inlined[Normalization] | None = Normalization()
    """What is made uniform in texts, before anything else looks at them. null: nothing. Spans and questions are never rewritten."""
    filters: Inlined[Filters] = Filters()
    """What a row's text must be like. By default only empty texts go; quality and repetition suit web text and are off."""
    drop_exact_duplicates: bool = True
    """Whether of rows that say exactly the same only the first is kept."""
    minhash: Inlined[MinHash] | None = None
    """Near-duplicates to drop; {} takes the defaults. null: none are looked for."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most rows to keep: those with the smallest hash of their content, which is a fair and repeatable sample. null: all."""

    @model_validator(mode="after")
    def check_format(self) -> CleanParams:
        given = self.source.given_format
        if given not in (None, self.format):
            raise ValueError(f"source: the layout {self.source.layout} gives {given}, and format is {self.format}.")
        if not FORMATS[self.format].rewritten and self.normalization not in (None, Normalization()):
            raise ValueError(f"normalization: {self.format} are never rewritten, because their offsets would move.")
        return self


def output_kind(params: CleanParams, inputs: Mapping[str, Kind]) -> Kind:
    return FORMATS[params.format].rows_kind


def check(forecast: Forecast) -> list[Problem]:
    """Files whose type cannot be told, and options that none of the files uses."""
    source = forecast.params.source
    try:
        if isinstance(source, FilesSource):
            source.files()
    except DataError as error:
        found = [problem for problem in error.problems if isinstance(problem, Problem)]
        return [replace(problem, where=f"params.source: {problem.where}") for problem in found]
    return []


def run(ctx: Context, params: CleanParams) -> Result:
    ledger = Ledger()
    scratch = ctx.work / "clean"
    scratch.mkdir(exist_ok=True)
    candidates = scratch / "candidates.jsonl"
    count = write_candidates(candidates, ctx, params, ledger)
    ctx.journal.note(f"read {ledger.read:,} rows; {count:,} are whole, pass the filters and are said once")
    near = find_near_duplicates(candidates, scratch / "minhash", ctx, params)
    left_out = beyond_max_rows(candidates, near, params)
    characters = write_kept(ctx.out / "rows.jsonl", candidates, near, left_out, params, ledger)
    candidates.unlink()
    if not ledger.kept:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in ledger.dropped.most_common())
        raise DataError(
            Problem(
                "source",
                f"no row of {ledger.read:,} is left ({reasons})",
                "Look at the source's layout, columns and carry, and at the filters.",
            )
        )
    ledger.write(ctx.out)
    report(ctx, ledger)
    metrics = {**ledger.metrics(), "characters_kept": float(characters)}
    return Result(metrics, Facts(dropped_rows=dict(sorted(ledger.dropped.items()))))


STAGE = Stage(
    kind="clean",
    version=4,
    summary="Reads one source and keeps the rows that are whole, good enough and not said before.",
    params=CleanParams,
    inputs={},
    output=output_kind,
    run=run,
    check=check,
)


def write_candidates(path: Path, ctx: Context, params: CleanParams, ledger: Ledger) -> int:
    """Writes (where, row) of every row that passes normalization, filters and exact deduplication; returns how many."""
    from stages.lib.sources.read import read_source

    judge = build_judge(params.filters)
    seen: set[bytes] = set()
    count = 0
    with path.open("wb") as file:
        for where, raw in read_source(params.source, params.format, ledger):
            row = normalize_row(raw, params.format, params.normalization)
            text = judged_text(row, params.format)
            if reason := emptied(row, params.format) or judge(text):
                ledger.drop(reason, f"{where}: {text}")
                continue
            if params.drop_exact_duplicates:
                digest = content_digest(row, params.format)
                if digest in seen:
                    ledger.drop("exact_duplicate", f"{where}: {text}")
                    continue
                seen.add(digest)
            file.write(json.dumps([where, row], ensure_ascii=False, allow_nan=False).encode() + b"\n")
            count += 1
            if count % 10_000 == 0:
                ctx.journal.write("progress", done=count, what="rows that pass the filters")
    return count


def emptied(row: Row, format: str) -> str | None:
    """`empty_field` if a text of the row, all of which are needed, is empty after normalization."""
    return None if all(text.strip() for text in FORMATS[format].texts(row)) else "empty_field"


def read_candidates(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for line in file:
            where, row = json.loads(line)
            yield where, row


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
    texts = (judged_text(row, params.format) for _, row in read_candidates(candidates))
    clusters = near_clusters(texts, minhash, scratch)
    parts = (FORMATS[params.format].parts(row) for _, row in read_candidates(candidates))
    return near_duplicates(clusters, parts, minhash.similarity)


def beyond_max_rows(candidates: Path, near: set[int], params: CleanParams) -> set[int]:
    """Positions of the candidates that `max_rows` leaves out: all but those with the smallest hash of their content."""
    if params.max_rows is None:
        return set()
    hashed = [
        (content_digest(row, params.format), position)
        for position, (_, row) in enumerate(read_candidates(candidates))
        if position not in near
    ]
    kept = {position for _, position in heapq.nsmallest(params.max_rows, hashed)}
    return {position for _, position in hashed} - kept


def write_kept(
    path: Path, candidates: Path, near: set[int], left_out: set[int], params: CleanParams, ledger: Ledger
) -> int:
    """Writes the rows that are kept, in the order of the source; returns their characters."""
    characters = 0
    with path.open("wb") as file:
        for position, (where, row) in enumerate(read_candidates(candidates)):
            text = judged_text(row, params.format)
            if position in near:
                ledger.drop("near_duplicate", f"{where}: {text}")
            elif position in left_out:
                ledger.drop("over_max_rows", f"{where}: {text}")
            else:
                file.write(encode_row(row))
                ledger.kept += 1
                characters += len(text)
    return characters


def report(ctx: Context, ledger: Ledger) -> None:
    """Tells the user what was kept and why the rest was not."""
    ctx.journal.note(f"kept {ledger.kept:,} of {ledger.read:,} rows ({ledger.kept / ledger.read:.1%})")
    for reason, count in ledger.dropped.most_common():
        example = " ".join(ledger.examples[reason][0][:100].split())
        ctx.journal.note(f"dropped {count:,}: {reason} (for example {example})")
    for reason, count in ledger.repaired.most_common():
        ctx.journal.note(f"repaired {count:,}: {reason}")
    for what, count in ledger.noticed.most_common():
        ctx.journal.note(f"{count:,} rows: {what}")
    if damaged := ledger.dropped["damaged_file"]:
        ctx.journal.note(
            f"{damaged:,} files break off, and what stood after is lost: {'; '.join(ledger.examples['damaged_file'])}"
        )
