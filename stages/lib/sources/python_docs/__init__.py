"""Rows made from a Python standard library, read with `ast`: nothing is imported, executed or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, Problem, did_you_mean
from stages.lib.rows.canonical import Row
from stages.lib.sources.python_docs.chats import chat_rows
from stages.lib.sources.python_docs.extraction import extraction_rows
from stages.lib.sources.python_docs.labels import label_rows
from stages.lib.sources.python_docs.modules import Module, module_files, read_modules
from stages.lib.sources.python_docs.preferences import judged_rows, preference_rows, rated_rows, step_rows
from stages.lib.sources.python_docs.questions import question_rows
from stages.lib.sources.python_docs.spans import span_rows
from stages.lib.sources.python_docs.text import text_rows


@dataclass(frozen=True)
class RowMaker:
    """How one format's rows are made."""

    rows: Callable[[Iterable[Module]], Iterator[Row]]
    """Rows with an id; those made `per_module` get the module's name as their group."""
    content: Callable[[Row], object]
    """What two rows must not share: modules copy functions from each other, and only one of them may be held out."""


def per_module(rows_of: Callable[[Module], Iterator[Row]]) -> Callable[[Iterable[Module]], Iterator[Row]]:
    def rows(modules: Iterable[Module]) -> Iterator[Row]:
        for module in modules:
            yield from ({**row, "group": module.name} for row in rows_of(module))

    return rows


def unanswered_rows(module: Module) -> Iterator[Row]:
    """The chats without their answers."""
    for row in chat_rows(module):
        yield {"id": row["id"], "prompt": row["messages"][:-1]}


FORMATS = {
    "text": RowMaker(per_module(text_rows), lambda row: row["text"]),
    "chats": RowMaker(per_module(chat_rows), lambda row: row["messages"][1]["content"]),
    "prompts": RowMaker(per_module(unanswered_rows), lambda row: row["prompt"][0]["content"]),
    "preferences": RowMaker(per_module(preference_rows), lambda row: row["chosen"][0]["content"]),
    "unpaired_preferences": RowMaker(per_module(judged_rows), lambda row: row["completion"][0]["content"]),
    "ratings": RowMaker(per_module(rated_rows), lambda row: row["completion"][0]["content"]),
    "step_labels": RowMaker(per_module(step_rows), lambda row: tuple(step["content"] for step in row["steps"])),
    "labels": RowMaker(label_rows, lambda row: row["text"]),
    "spans": RowMaker(per_module(span_rows), lambda row: row["text"]),
    "questions": RowMaker(per_module(question_rows), lambda row: (row["context"], row["question"])),
}


JSON_CHATS = RowMaker(per_module(extraction_rows), lambda row: row["messages"][0]["content"])
"""What chats are where their answers are JSON."""


def python_docs_rows(
    root: Path, format: str, packages: list[str] | None = None, answers: str = "text"
) -> Iterator[Row]:
    """Canonical rows of `format` from the modules below `root`, the same in every run. `answers`: text, or json of chats.

    `group` is the dotted name of the row's module in every format, so that a module held out of one is held out of
    all. `packages` are top-level names (`json`, `argparse`); None takes all. Raises DataError at once, not at the
    first row, for a format or a package that does not exist, and for a root without modules.
    """
    if format not in FORMATS:
        raise DataError(Problem("python_docs", f"no format '{format}'", did_you_mean(format, FORMATS)))
    module_files(root, packages)
    maker = JSON_CHATS if answers == "json" else FORMATS[format]
    return distinct_rows(maker, read_modules(root, packages))


def distinct_rows(maker: RowMaker, modules: Iterable[Module]) -> Iterator[Row]:
    """The first row of each content, marked with its source."""
    seen = set()
    for row in maker.rows(modules):
        content = maker.content(row)
        if content not in seen:
            seen.add(content)
            yield {**row, "source": "python_docs"}
