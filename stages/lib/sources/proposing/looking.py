"""What a file is, by its first block: its type, its encoding, and the options that its reader needs."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.sources.encodings import likely_encoding, wide_encoding
from stages.lib.sources.files import conll_columns
from stages.lib.sources.lines import Damaged, blocks_of, has_bare_returns
from stages.lib.sources.other_files import unread_content
from stages.lib.sources.params import COMPRESSIONS, SUFFIXES, type_of
from stages.lib.sources.proposing.json_places import places_in
from stages.lib.sources.proposing.tables import delimiter_of, header_of, label_first, table_lines, tabs_between_quotes
from stages.lib.sources.turns import ROLE_KEYS

LINES_LOOKED_AT = 2000
HEAD_BYTES = 1 << 20
LESS_LIKELY = 0.6

ARROW_STARTS = (b"ARROW1", b"\xff\xff\xff\xff")

BIO_TAG = re.compile(r"O|[BIESMLUW][-_].+|.+[-_][BIESMLUW]")
LEAST_PARTS = 5
"""A text file of at least so many paragraphs, or lines, is read part by part."""


@dataclass(frozen=True)
class ReaderChoice:
    """Options of a `files` source that may read a file, and why."""

    options: dict[str, Any]
    why: list[str] = field(default_factory=list)
    likelihood: float = 1.0
    """Less than 1 where the file looks more like another type."""


def choices_for(path: Path, given: Mapping[str, Any], *, alone: bool = True) -> list[ReaderChoice]:
    """How the file may be read, the likeliest first; options that are `given` stay as they are. Where it is not `alone`,
    others beside it are read in the same way.

    Raises `DataError` for what no reader reads, with what to do.
    """
    head = first_block(path)
    if head.startswith(b"PAR1"):
        told = type_of(path) == "parquet"
        return [ReaderChoice({} if told else {"file_type": "parquet"}, ["it is a Parquet file"])]
    refuse_other_files(path, head)
    encoding, reason = encoding_of(path, head, given)
    content = decoded(head, given.get("encoding") or encoding or "utf-8")
    declared = given.get("file_type") or type_of(path)
    found = []
    likelihood = 1.0
    for file_type in dict.fromkeys(types_of_content(content, declared)):
        known = {"encoding": encoding, **given, "several": not alone}
        for choice in READ_AS[file_type](path, content, known):
            options = {"file_type": file_type} if file_type != type_of(path) else {}
            options |= {"encoding": encoding} if encoding else {}
            why = [*reason, *type_reason(path, file_type), *choice.why]
            found.append(ReaderChoice({**options, **choice.options, **given}, why, likelihood))
        likelihood = LESS_LIKELY
    return found


def first_block(path: Path) -> bytes:
    """The first bytes, decompressed. Raises `DataError` where there are none."""
    head = b""
    try:
        for block in blocks_of(path):
            head += block
            if len(head) >= HEAD_BYTES:
                break
    except Damaged as damage:
        hint = "Get it whole, or give it the suffix that says what it is."
        raise DataError(Problem(str(path), f"cannot be decompressed: {damage}", hint)) from None
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read: {error.strerror or error}", "Check the file.")) from None
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(Problem(str(path), "holds nothing", "Name a file with rows in it."))
    return head


def refuse_other_files(path: Path, head: bytes) -> None:
    """Raises `DataError` for content that no reader reads."""
    if problem := unread_content(path, head):
        raise DataError(problem)
    if head.startswith(ARROW_STARTS) or path.suffix == ".arrow":
        whole = path.parent if (path.parent / "state.json").exists() else None
        hint = f"Inspect its folder: {whole}." if whole else "Write it as Parquet, and inspect that."
        raise DataError(Problem(str(path), "is an Arrow file, which is not read by itself", hint))
    if b"\0" in head[:8192]:
        suffixes = ", ".join([*SUFFIXES, *(f".jsonl{each}" for each in COMPRESSIONS)])
        hint = f"Rows are read from text files and Parquet: {suffixes}. If it is text, set encoding, such as utf-16-le."
        if not wide_encoding(head):
            raise DataError(Problem(str(path), "is neither text nor Parquet", hint))


def encoding_of(path: Path, head: bytes, given: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The encoding to declare, None for UTF-8, and why."""
    if "encoding" in given:
        return None, []
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", ["it begins with the mark of utf-16"]
    if wide := wide_encoding(head):
        return wide, [f"it is no UTF-8, and looks like {wide}"]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        broken = head.decode("utf-8", "replace").count("\ufffd")
        whole = sum(len(run) > 1 for run in re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", head))
        looks = likely_encoding(path)
        if looks and broken > whole:
            return looks, [f"it is no UTF-8, and looks like {looks}"]
        return None, [f"{broken:,} of its bytes are no UTF-8: rows with such are dropped"]
    return None, []


def decoded(head: bytes, encoding: str) -> str:
    """The block as text, up to its last whole line."""
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).removeprefix("\ufeff")
    if has_bare_returns(head):
        text = text.replace("\r", "\n")
    return text if len(head) < 1 << 18 or "\n" not in text else text[: text.rindex("\n") + 1]


def types_of_content(content: str, declared: str | None) -> Iterator[str]:
    """File types that the content may be, the likeliest first. A type that is declared stays, unless it cannot be."""
    json_type = json_type_of(content, declared)
    if json_type == "jsonl" and lines_are_lists_of_rows(content):
        yield "json"  # which reads list after list
    if declared in ("jsonl", "json") or (declared in (None, "text") and json_type):
        yield json_type or declared or "text"
        return
    if declared in ("csv", "tsv"):
        delimiter = delimiter_of(content)
        if delimiter == "\t" and tabs_between_quotes(content):
            yield "csv"
            return
        yield "tsv" if delimiter == "\t" or (delimiter is None and label_first(content)) else "csv"
        return
    if declared == "conll" or tag_columns(content):
        yield "conll"
    if declared == "conll":
        return
    if delimiter := delimiter_of(content, strict=True):
        yield "tsv" if delimiter == "\t" and not tabs_between_quotes(content) else "csv"
    elif label_first(content):
        yield "tsv"
    yield "text"


JSON_START = re.compile(r'\s*(\[\s*(\{|\[|"|\])|\{\s*("|\}))')


def json_type_of(content: str, declared: str | None) -> str | None:
    """`jsonl` where lines are rows of their own, `json` for a list or a document, None for what is neither."""
    if not JSON_START.match(content):
        return None
    lines = [line for line in content.split("\n", LINES_LOOKED_AT)[:20] if line.strip()]
    if len(lines) == 1:  # one document, one row, or the beginning of a row that is longer than what is looked at
        return declared if declared in ("jsonl", "json") else "json"
    whole = sum(map(is_json_row, lines))
    return "jsonl" if whole * 2 > len(lines) else "json"


def lines_are_lists_of_rows(content: str) -> bool:
    """Whether each line is a list of mappings that are rows, and no turns of one conversation."""
    lines = [line for line in content.split("\n", LINES_LOOKED_AT)[:20] if line.strip()]
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    rows = [row for each in found if isinstance(each, list) for row in each]
    whole = all(isinstance(each, list) for each in found) and all(isinstance(row, dict) for row in rows)
    return whole and bool(rows) and not any(row.keys() & set(ROLE_KEYS) for row in rows)


def is_json_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def type_reason(path: Path, file_type: str) -> list[str]:
    named = type_of(path)
    if named == file_type:
        return []
    suffix = "".join(path.suffixes[-2:]) or "no suffix"
    return [f"its content is {file_type}, which {suffix} does not say"]


@dataclass(frozen=True)
class TagColumns:
    """Where tokens and tags stand in text in CoNLL's form, as `read_conll` counts columns."""

    token: int
    tag: int
    comment_prefix: str | None


def tag_columns(content: str) -> TagColumns | None:
    """The columns of text in CoNLL's form; None for other text."""
    lines = [line.rstrip("\r") for line in content.split("\n", LINES_LOOKED_AT)[:LINES_LOOKED_AT]]
    lines = [line for line in lines if line.strip() and not line.startswith("-DOCSTART-")]
    with_tabs = sum("\t" in line for line in lines) > len(lines) / 3
    rows = [conll_columns(line) for line in lines]
    widths = Counter(len(row) for row, line in zip(rows, lines, strict=True) if not with_tabs or "\t" in line)
    width = widths.most_common(1)[0][0] if widths else 0
    tokens, comments, odd = [], [], 0
    for row, line in zip(rows, lines, strict=True):
        if len(row) == width and ("\t" in line or not with_tabs):
            tokens.append(row)
        elif line.startswith("#"):
            comments.append(line)
        else:
            odd += 1
    if width < 2 or odd > 0.05 * len(tokens):
        return None
    prefix = "# " if all(line.startswith("# ") for line in comments) else "#"
    spelled = any(line.startswith(prefix) for line in lines if line not in set(comments))
    for column in [-1, *range(width - 1)]:
        tags = [row[column] for row in tokens]
        if sum(bool(BIO_TAG.fullmatch(tag)) for tag in tags) >= 0.95 * len(tags) and len(set(tags)) > 1:
            numbered = width > 2 and all(row[0].isdigit() for row in tokens)
            return TagColumns(int(numbered), column, prefix if comments and not spelled else None)
    return None


# How each type is read


def read_plainly(path: Path, content: str, given: Mapping[str, Any]) -> Iterator[ReaderChoice]:
    yield ReaderChoice({})


def read_document(path: Path, content: str, given: Mapping[str, Any]) -> Iterator[ReaderChoice]:
    """A JSON list as it is; of a document each place where rows may stand."""
    if content.lstrip().startswith("[") or "records" in given:
        yield ReaderChoice({})
        return
    for place, reason in places_in(path, given.get("encoding")):
        yield ReaderChoice({"records": place} if place else {}, [reason] if reason else [])


def read_fields(path: Path, content: str, given: Mapping[str, Any]) -> Iterator[ReaderChoice]:
    """Lines of fields: with a header or without, and between which characters."""
    if label_first(content) and delimiter_of(content) is None:
        options = {"has_header": False, "delimiter": " ", "max_fields": 2}
        yield ReaderChoice(options, ["each line begins with a label, and the text follows behind a space"])
        return
    delimiter = given.get("delimiter") or delimiter_of(content) or ","
    options, why = {}, []
    quoted = delimiter == "\t" and given.get("file_type") != "tsv" and tabs_between_quotes(content)
    if quoted:
        options["delimiter"] = delimiter
        why.append("quotation marks enclose its fields, which stand apart by tabs")
    elif delimiter not in (",", "\t"):
        options["delimiter"] = delimiter
        why.append(f"its fields stand apart by {delimiter!r}")
    lines = table_lines(content, delimiter, quoted=quoted)
    if lines and not header_of(lines):
        options["has_header"] = False
        why.append(f"its first line looks like a row, so the columns are called 0 to {len(lines[0]) - 1}")
    yield ReaderChoice(options, why)


def read_sentences(path: Path, content: str, given: Mapping[str, Any]) -> Iterator[ReaderChoice]:
    """Tokens with tags."""
    found = tag_columns(content) or TagColumns(0, -1, None)
    options: dict[str, Any] = {}
    if (found.token, found.tag) != (0, -1):
        options |= {"token_column": found.token, "tag_column": found.tag}
    if found.comment_prefix:
        options["comment_prefix"] = found.comment_prefix
    yield ReaderChoice(options, [f"{name} is {value!r}" for name, value in options.items()])


def read_running_text(path: Path, content: str, given: Mapping[str, Any]) -> Iterator[ReaderChoice]:
    """By paragraphs or by lines where a file has them, and else whole."""
    paragraphs = len(re.findall(r"\n[^\S\n]*\n+(?=\s*\S)", content)) + 1
    lines = sum(bool(line.strip()) for line in content.split("\n"))
    others = "split_text can be file, paragraph or line"
    if "split_text" in given:
        yield ReaderChoice({})
    elif given.get("several"):
        yield ReaderChoice({}, [f"each file is a row; {others}"])
    elif paragraphs >= LEAST_PARTS:
        why = f"blank lines part it into paragraphs ({paragraphs:,} where it begins); {others}"
        yield ReaderChoice({"split_text": "paragraph"}, [why])
    elif lines >= LEAST_PARTS:
        why = f"it has lines ({lines:,} where it begins) and hardly a blank one between them; {others}"
        yield ReaderChoice({"split_text": "line"}, [why])
    else:
        yield ReaderChoice({}, [f"it is one row; {others}"])


READ_AS = {
    "jsonl": read_plainly,
    "json": read_document,
    "csv": read_fields,
    "tsv": read_fields,
    "parquet": read_plainly,
    "conll": read_sentences,
    "text": read_running_text,
}
