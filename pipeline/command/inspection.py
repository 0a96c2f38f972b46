"""What `slipway inspect` takes and prints: settings become fields of a source, and a report becomes lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from pipeline.errors import Problem, RecipeError, shown
from pipeline.figures import number, printable, table
from pipeline.recipe.overrides import put_at
from pipeline.settings.yaml_loader import parse_yaml

LONGEST_TEXT_CHARACTERS = 1200
"""Of a text that is shown; the middle of a longer one is left out."""

MARKED = ("[[", "]]")
COLOURED = ("\x1b[1;32m", "\x1b[0m")


def source_fields(assignments: Iterable[str]) -> dict[str, Any]:
    """The fields of a source that `--set field=value` decides. Raises `RecipeError` for what is no such thing."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        where = f"--set {shown(assignment, quoted=False)}"
        target, separator, text = assignment.partition("=")
        keys = target.strip().split(".")
        if not separator or not all(keys):
            raise RecipeError(Problem(where, "is not of the form field=value", "Write --set records=train."))
        value, problems = parse_yaml(text, where)
        if problems:
            raise RecipeError(*problems)
        put_at(fields, keys, value, where)
    return fields


def report_lines(report: Mapping[str, Any], stream: TextIO) -> list[str]:
    """The report as people read it; what carries loss, or is marked, in colour on a terminal and in [[brackets]] elsewhere."""
    begin, end = COLOURED if stream.isatty() else MARKED
    made = {"data": data_lines, "rows": rows_lines, "model": model_lines}[report["what"]]
    return [
        "".join(f"{begin}{said}{end}" if marked and said else said for said, marked in line.printable(stream))
        for line in made(report)
    ]


class Line:
    """A line to print: stretches of text, some of them marked."""

    def __init__(self, text: str = "", *, marked: bool = False) -> None:
        self.stretches = [(text, marked)]

    def printable(self, stream: TextIO) -> Iterator[tuple[str, bool]]:
        for text, marked in self.stretches:
            yield printable(text, stream), marked


def plain(lines: Iterable[str]) -> Iterator[Line]:
    return (Line(line) for line in lines)


# Data from outside


def data_lines(report: Mapping[str, Any]) -> Iterator[Line]:
    yield Line(", ".join(report["paths"]))
    yield from plain(f"note: {note}" for note in report["notes"])
    yield from plain(column_lines(report["columns"]))
    proposals = report["proposals"]
    if not proposals:
        yield Line("")
        yield Line(
            "no layout fits. What comes nearest:" if report["missing"] else "no layout fits, and none comes near"
        )
        yield from plain(f"  {sentence}" for sentence in report["missing"])
        yield Line("Rename columns with `--set columns.OURS=THEIRS`, or write the rows anew in one of the layouts.")
        yield from plain(count_lines(report["rows"]))
        return
    for position, proposal in enumerate(proposals):
        yield Line("")
        title = "proposed" if position == 0 else "as good"
        yield Line(f"{title}: layout {proposal['layout']}, which gives {proposal['format']}")
        yield from plain(f"  {reason}" for reason in proposal["why"])
        sample = proposal["of_sample"]
        more = f", {sample['of_its_form']:,} more have its form" if sample["of_its_form"] else ""
        yield Line(f"  {sample['converted']:,} of the first {sample['read']:,} rows convert{more}")
        yield Line("")
        yield from plain(recipe_lines(report["paths"][0], proposal))
        yield Line("")
        yield from plain(count_lines(proposal["rows"]))
        yield from plain(f"  `clean` would stop: {sentence}" for sentence in proposal.get("stops", []))
        yield from looks_lines(proposal)
    if report["also_fit"]:
        yield Line("")
        yield Line("what else converts (--layout shows it in full):")
        for other in report["also_fit"]:
            converted = f"{other['of_sample']['converted']:,} of {other['of_sample']['read']:,} rows"
            fields = ", ".join(f"{name}: {value}" for name, value in other["source"].items() if name not in LOCATING)
            yield Line(f"  {fields} ({other['format']}; {converted})")


LOCATING = ("kind", "paths", "path")


def column_lines(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    if not columns:
        return []
    rows = [[short(each["name"]), each["holds"], f"{each['filled']:,}"] for each in columns[:40]]
    more = [f"... and {len(columns) - 40:,} more columns"] if len(columns) > 40 else []
    return ["", *table(rows, ("column", "holds", "in rows")), *more]


def recipe_lines(place: str, proposal: Mapping[str, Any]) -> list[str]:
    """The block of a recipe that reads the data, ready to be pasted."""
    step = re.sub(r"[^a-z0-9_-]+", "_", Path(place).name.lower().partition(".")[0]).strip("_-")[:50] or "data"
    params = {"format": proposal["format"], "source": proposal["source"]}
    block = {"stages": {f"{step}_rows": {"kind": "clean", "params": params}}}
    text = yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=10_000)
    return text.rstrip("\n").split("\n")


def count_lines(rows: Mapping[str, Any]) -> list[str]:
    """`rows in = rows out + rows dropped`, and why each was dropped, mended or not read whole."""
    which = "all rows" if rows["complete"] else "the first rows (--rows 0 reads all)"
    lines = [f"{which}: {rows['read']:,} read = {rows['kept']:,} kept + {rows['dropped']:,} dropped"]
    for each in rows["reasons"]:
        meaning = f": {each['meaning']}" if each["meaning"] else ""
        lines.append(f"  dropped {each['count']:,}: {each['reason']}{meaning}")
        lines.append(f"    for example {short(each['example'])}")
    for each in rows["repaired"]:
        lines.append(f"  repaired {each['count']:,}: {each['meaning'] or each['what']}")
    for each in rows["noticed"]:
        lines.append(f"  {each['count']:,} rows: {each['what']}")
        lines += [f"    for example {short(each['example'])}"] if "example" in each else []
    return lines


def short(text: str) -> str:
    return " ".join(text[:200].split())


def looks_lines(looks: Mapping[str, Any]) -> Iterator[Line]:
    """Lengths, and the first rows in full."""
    for unit in ("characters", "tokens"):
        if looks.get(unit):
            figures = ", ".join(f"{name} {number(value)}" for name, value in looks[unit].items())
            yield Line(f"{unit} a row: {figures}")
    if "longer_than_max_length_tokens" in looks:
        yield Line(f"longer than --max-length-tokens: {looks['longer_than_max_length_tokens']:,} rows")
    refused = looks.get("not_rendered", {})
    if refused.get("count"):
        yield Line(f"not rendered by this model's template: {refused['count']:,} rows")
        yield from plain(f"  for example {short(example)}" for example in refused["examples"])
    for shown_row in looks["shown"]:
        yield Line("")
        yield Line(shown_row["where"])
        for each in shown_row["parts"]:
            yield from part_lines(each)
        others = {name: shown_row["row"][name] for name in ("id", "group", "columns") if name in shown_row["row"]}
        yield from plain(f"  {name}: {value}" for name, value in others.items())


def part_lines(part: Mapping[str, Any]) -> Iterator[Line]:
    """What one part of a row says, marked where it is learned or found, behind its name."""
    line = Line(f"  {part['name']}: ")
    for piece, marked in cut_pieces(part["pieces"]):
        first, *rest = piece.replace("\r", "\\r").split("\n")
        line.stretches.append((first, marked))
        for each in rest:
            yield line
            line = Line("    ")
            line.stretches.append((each, marked))
    yield line


def cut_pieces(pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The pieces, the middle of long ones left out."""
    most = max(LONGEST_TEXT_CHARACTERS // max(len(pieces), 1), 120)
    for text, marked in pieces:
        yield (text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"), marked


# Artifacts and models


def rows_lines(report: Mapping[str, Any]) -> Iterator[Line]:
    yield from plain(head_lines(report))
    if "rows" in report:
        yield from plain(count_lines(report["rows"]))
    for each in report["files"]:
        yield Line("")
        which = "all" if each["complete"] else "the first"
        yield Line(f"{each['file']}: {which} {each['looked_at']:,} rows looked at")
        yield from looks_lines(each)


def head_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [report["folder"]]
    if "step" in report:
        lines.append(
            f"{report['step']}: {report['artifact_kind']} made by {report['stage']}, id {report['artifact_id'][:12]}"
        )
    return lines


def model_lines(report: Mapping[str, Any]) -> Iterator[Line]:
    yield from plain(head_lines(report))
    for title in ("architecture", "adapter", "facts", "tokenizer"):
        if report.get(title):
            yield Line(title)
            yield from plain(f"  {name}: {value}" for name, value in report[title].items())
    if "generation_stop_ids" in report:
        yield Line(
            f"stop ids of generation_config.json: {', '.join(map(str, report['generation_stop_ids'])) or 'none'}"
        )
    if "problem" in report:
        yield Line(f"its tokenizer cannot be used: {report['problem']}")
    if "chat_template" in report:
        yield Line("chat template")
        templates = report["chat_template"]
        for name, text in templates.items() if isinstance(templates, Mapping) else [("", templates)]:
            yield from plain([f"  {name}:"] if name else [])
            yield from plain(f"  {line}" for line in text.split("\n"))
    if "example" in report:
        yield Line("")
        if "problem" in report["example"]:
            yield Line(f"the example chat is not rendered: {report['example']['problem']}")
        for each in report["example"].get("parts", []):
            yield from part_lines(each)
