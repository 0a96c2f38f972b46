"""The one door of this room: what is to be told of a place, whatever lies there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, Problem, did_you_mean
from stages.lib.inspecting.artifacts import inspect_folder, is_described
from stages.lib.inspecting.data import Asked, inspect_data
from stages.lib.rows.canonical import FORMATS
from stages.lib.sources.layouts import LAYOUTS
from stages.lib.sources.params import DatasetSource, FilesSource


def inspect_places(
    places: Sequence[str],
    *,
    layout: str | None,
    format: str | None,
    given: Mapping[str, Any],
    model: Path | None,
    num_rows: int,
    num_shown: int,
    max_length_tokens: int | None,
) -> dict[str, Any]:
    """What is known of the data, the artifact or the model at the places, as plain values that JSON can hold."""
    refuse_unknown(layout, format, given)
    if max_length_tokens is not None and model is None:
        hint = "Name the model whose tokens are counted: --model FOLDER."
        raise DataError(Problem("--max-length-tokens", "is a number of tokens, and no tokenizer is named", hint))
    asked = Asked(layout, format, given, model, num_rows, num_shown, max_length_tokens)
    if len(places) == 1 and is_described(Path(places[0])):
        return inspect_folder(Path(places[0]), asked)
    return inspect_data(places, asked)


def refuse_unknown(layout: str | None, format: str | None, given: Mapping[str, Any]) -> None:
    """Raises `DataError` for names that are none, and for layouts that do not give the format."""
    problems = []
    if layout is not None and layout not in LAYOUTS:
        problems.append(Problem("--layout", f"there is no '{layout}'", did_you_mean(layout, LAYOUTS)))
    if format is not None and format not in FORMATS:
        problems.append(Problem("--format", f"there is no '{format}'", did_you_mean(format, FORMATS)))
    if not problems and layout and format and LAYOUTS[layout].format != format:
        hint = f"Write --format {LAYOUTS[layout].format}, or leave it out."
        problems.append(Problem("--format", f"the layout {layout} gives {LAYOUTS[layout].format}, not {format}", hint))
    fields = {*FilesSource.model_fields, *DatasetSource.model_fields} - {"kind", "paths", "path", "layout"}
    for name in given.keys() - fields:
        problems.append(Problem(f"--set {name}", "a source has no such field to set", did_you_mean(name, fields)))
    columns = given.get("columns", {})
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        problems.append(Problem("--set columns", "is not a mapping of names", "Write --set columns.text=body."))
    else:
        names = {"id", "group", *(name for known in LAYOUTS.values() for name in known.columns)}
        for name in columns.keys() - names:
            problems.append(Problem(f"--set columns.{name}", "no layout has such a column", did_you_mean(name, names)))
    if problems:
        raise DataError(*problems)
