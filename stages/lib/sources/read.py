"""Reads a source from outside as canonical rows, counting in a ledger what cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.rows.canonical import Row
from stages.lib.rows.ledger import Ledger
from stages.lib.sources.arrow_reader import read_dataset, read_hub
from stages.lib.sources.conversion import NO_LABEL, REASONS, Conversion, Dropped
from stages.lib.sources.encodings import TEXT_TYPES, likely_encoding
from stages.lib.sources.files import read_files
from stages.lib.sources.layouts import convert_record
from stages.lib.sources.lines import Broken, Limits, Record
from stages.lib.sources.params import DatasetSource, FilesSource, HubSource, LaidOutSource, PythonDocsSource
from stages.lib.sources.span_ends import odd_ends


def read_source(source: Any, format: str, ledger: Ledger) -> Iterator[tuple[str, Row]]:
    """(where, canonical row) of everything usable in a `Source`. What is not is counted in the ledger.

    Raises `DataError` at the end if there was nothing to read, a file that breaks off, or more broken rows than the source
    allows.
    """
    if isinstance(source, PythonDocsSource):
        from stages.lib.sources.python_docs import python_docs_rows  # which knows much that other sources need not load

        for row in python_docs_rows(source.root, format, source.packages, source.answers):
            ledger.read += 1
            yield str(row.get("group", "python_docs")), row
    else:
        yield from read_laid_out(source, ledger)
    if isinstance(source, FilesSource):
        refuse_damaged_files(source, ledger)
    if not ledger.read:
        raise DataError(Problem(place_of(source), "holds no rows", "Check what the source names."))
    if not isinstance(source, PythonDocsSource):
        refuse_unclear(ledger)
        refuse_too_many_broken(source, ledger)
        if ledger.dropped["not_utf8"] and (looks := look_of(source, ledger)):
            ledger.noticed[f"dropped because they are no UTF-8: the file looks like encoding: {looks}"] += (
                ledger.dropped["not_utf8"]
            )


def read_laid_out(source: LaidOutSource, ledger: Ledger) -> Iterator[tuple[str, Row]]:
    yield from convert_records(read_records(source), source, ledger)


def read_records(source: LaidOutSource) -> Iterator[Record | Broken]:
    """The raw records of a source, in order, whatever their layout."""
    limits = Limits(row_bytes=source.max_row_bytes)
    if isinstance(source, FilesSource):
        return read_files(source, limits)
    if isinstance(source, DatasetSource):
        return read_dataset(source, limits)
    assert isinstance(source, HubSource)
    return read_hub(source, limits)


def convert_records(
    records: Iterable[Record | Broken], source: LaidOutSource, ledger: Ledger
) -> Iterator[tuple[str, Row]]:
    """(where, canonical row) of each record that the source's layout can use. What it cannot is counted in the ledger."""
    separator = " " if source.token_separator is None else source.token_separator
    conversion = Conversion(
        token_separator=separator,
        strip_segment_digit=source.strip_segment_digit,
        turns_in_text=source.turns_in_text,
        unlabelled=source.unlabelled,
        first_answer=source.first_answer,
        second_answer=source.second_answer,
        no_label=NO_LABEL if source.no_label is None else tuple(source.no_label),
        span_offsets=source.span_offsets,
        rating_columns=tuple(source.rating_columns or ()),
        declared=frozenset(source.columns),
    )
    for record in records:
        if isinstance(record, Broken):
            ledger.read += 1
            ledger.drop(record.reason, example(record.where, record.detail, record.snippet))
            continue
        for raw, found in convert_record(record.row, source.laid_out, source.columns, conversion, source.carry):
            ledger.read += 1
            if isinstance(found, Dropped):
                ledger.drop(found.reason, example(record.where, found.detail, repr(raw)))
            else:
                conversion.noticed.update(record.noticed)
                yield record.where, found
    ledger.repaired.update(conversion.repaired)
    ledger.noticed.update(conversion.noticed)
    if conversion.odd_spans:
        what, rows = odd_ends(conversion.span_ends), conversion.span_ends["rows"]
        ledger.notice(what, *conversion.odd_spans, count=rows)
    if conversion.preferred["0"] and conversion.preferred["1"] and not conversion.preferred["above 1"]:
        ledger.unclear.append(counted_from_where(source, conversion.preferred))


def counted_from_where(source: LaidOutSource, preferred: Mapping[str, int]) -> Problem:
    what = f"is 0 in {preferred['0']:,} rows, 1 in {preferred['1']:,} and 2 in none, so nobody can tell whether 1 is the first answer or the second"
    hint = (
        "Set first_answer: 0 where 0 is output_1 and 1 is output_2, first_answer: 1 and second_answer: 0 where it is the other "
        "way round, or first_answer: 1 alone where 0 says that they are as good."
    )
    return Problem(source.columns.get("preference", "preference"), what, hint)


def example(where: str, detail: str, snippet: str) -> str:
    return ": ".join(part for part in (where, detail, snippet) if part)


def refuse_damaged_files(source: FilesSource, ledger: Ledger) -> None:
    """Raises `DataError` if files break off, unless the source allows that: nobody knows how many rows were lost."""
    damaged = ledger.dropped["damaged_file"]
    if damaged and not source.allow_damaged_files:
        what = (
            f"{damaged:,} files break off, and what stood after is lost: {'; '.join(ledger.examples['damaged_file'])}"
        )
        hint = "Get them whole, or set allow_damaged_files: true to go on with what stands before."
        raise DataError(Problem(place_of(source), what, hint))


def refuse_unclear(ledger: Ledger) -> None:
    """Raises `DataError` if what a column means must be said, since its values leave it open."""
    if ledger.unclear:
        raise DataError(*ledger.unclear)


def refuse_too_many_broken(source: LaidOutSource, ledger: Ledger) -> None:
    """Raises `DataError` with counts and examples if more rows are broken than the source allows."""
    broken = {reason: count for reason, count in ledger.dropped.items() if reason in REASONS and REASONS[reason].broken}
    total = sum(broken.values())
    if total <= source.max_broken_fraction * ledger.read:
        return
    encoding = f" Or set encoding: {looks}." if (looks := look_of(source, ledger)) else ""
    problems = [
        Problem(
            place_of(source),
            f"{total:,} of {ledger.read:,} rows are broken ({total / ledger.read:.1%}), and max_broken_fraction is "
            f"{source.max_broken_fraction:.1%}",
            f"Correct `layout` and `columns`, or the data; or raise max_broken_fraction.{encoding}",
        )
    ]
    for reason, count in sorted(broken.items(), key=lambda item: (-item[1], item[0])):
        examples = "; ".join(ledger.examples[reason][:2])
        problems.append(Problem(reason, f"{count:,} rows: {REASONS[reason].meaning}", f"For example {examples}"))
    raise DataError(*problems)


def look_of(source: LaidOutSource, ledger: Ledger) -> str | None:
    """The encoding that the first file with rows that are no UTF-8 looks like, or, where rows are broken in another way, the
    first file if it has 2 bytes a character: ASCII in UTF-16 is UTF-8 too, with a null after each letter. None where it is
    the one that the source names.
    """
    if not isinstance(source, FilesSource) or not ledger.dropped:
        return None
    files = [(path, name) for path, name, file_type in source.files() if file_type in TEXT_TYPES]
    if ledger.dropped["not_utf8"]:
        wanted = ledger.examples["not_utf8"][0].partition(":")[0]
        found = next((likely_encoding(path) for path, name in files if name == wanted), None)
    else:
        found = next((likely_encoding(path) for path, _ in files), None)
        found = found if found and found.startswith("utf-16") else None
    return found if found != source.encoding else None


def place_of(source: Any) -> str:
    """What a message calls the source."""
    if isinstance(source, FilesSource):
        names = [str(path) for path in source.paths]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if isinstance(source, PythonDocsSource):
        return str(source.root)
    return str(source.path) if isinstance(source, DatasetSource) else f"{source.dataset}@{source.revision}"
