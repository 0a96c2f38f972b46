"""YAML as version 1.2 reads it: `2e-5` is a number, `1:30` and `no` are strings, equal keys are an error.

PyYAML follows version 1.1, where `2e-5` is a string, `1:30` is 90 and the last of two equal keys wins in silence. So only
its parser is used. The document is built from the parser's events, one after the other and without recursion, and what it
may hold is limited while it is read: a few lines of YAML can stand for more values than any memory holds.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import MOST_PROBLEMS, PathError, Problem, RecipeError, shown
from pipeline.settings.paths import read_file
from pipeline.settings.yaml_scalars import BEGINNINGS, read_float, read_int, refuse_not_finite

MOST_BYTES = 2 << 20
"""Of a file. A recipe with every stage has ten thousand; a list of many files is better written as a pattern."""


MOST_VALUES = 50_000
"""Of a document, with its aliases written out: a hundred times what a recipe with every stage has."""


MOST_CHARACTERS = 2 * MOST_BYTES
"""In the values of a document, with its aliases written out."""


MOST_LEVELS = 64
"""Of lists and mappings within each other. Recipes have eight."""


MOST_DIRECTIVES = 100
"""Lines that begin with `%`. The parser compares each with all before it, so thousands of them would take long."""


DIRECTIVE = re.compile("(?:^|[\r\n\x85\u2028\u2029])%")


STANDARD = "tag:yaml.org,2002:"


SCALARS: tuple[tuple[str, re.Pattern[str], Callable[[str], Any]], ...] = (
    ("null", re.compile(r"~|null|Null|NULL|"), lambda text: None),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), read_int),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"), read_float),
    ("float", re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"), refuse_not_finite),
)
"""(tag, what matches, how it is read) of values without quotes, the first that matches; all others are strings."""


MERGE = object()
"""The key `<<`, whose value's entries are entries of the mapping."""


@dataclass(frozen=True)
class Anchored:
    """A value that aliases may stand for, and what it adds to a document."""

    value: Any
    values: int
    characters: int
    levels: int


@dataclass
class Collection:
    """A list or mapping that is being read."""

    line: int
    anchor: str | None
    is_mapping: bool
    values_before: int
    characters_before: int
    levels: int = 1
    items: list[Any] = field(default_factory=list)
    entries: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[dict[str, Any]] = field(default_factory=list)
    key: Any = None
    has_key: bool = False

    def finished(self) -> Any:
        """The list or mapping. What stands in a mapping itself counts more than what is merged, and that in its order."""
        if not self.is_mapping:
            return self.items
        merged: dict[str, Any] = {}
        for source in reversed(self.merged):
            merged.update(source)
        return {**merged, **self.entries}


class Builder:
    """Builds one document from the events of the parser. `problems` are those that do not keep it from being read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []
        self.document: Any = None
        self.documents = 0
        self.open: list[Collection] = []
        self.anchors: dict[str, Anchored] = {}
        self.values = 0
        self.characters = 0

    def refuse(self, line: int, what: str, hint: str) -> RecipeError:
        return RecipeError(*self.problems, Problem(f"{self.where}:{line}", what, hint))

    def problem(self, line: int, what: str, hint: str) -> None:
        if len(self.problems) >= MOST_PROBLEMS:
            raise self.refuse(line, what, f"{hint} More was not looked for.")
        self.problems.append(Problem(f"{self.where}:{line}", what, hint))

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        match event:
            case yaml.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    raise self.refuse(line, "begins a second document", "Keep one document in a file.")
            case yaml.ScalarEvent():
                self.count(1, len(event.value), line)
                value = self.scalar(event, line)
                anchored = "<<" if value is MERGE else value
                self.remember(event.anchor, Anchored(anchored, 1, len(event.value), 0))
                self.place(value, line)
            case yaml.AliasEvent():
                self.place(self.alias(str(event.anchor), line), line)
            case yaml.CollectionStartEvent():
                self.begin(event, line)
            case yaml.CollectionEndEvent():
                self.end()

    def count(self, values: int, characters: int, line: int) -> None:
        """Adds to the size of the document, before anything of that size is made."""
        self.values += values
        self.characters += characters
        hint = "Write less, or name files by a pattern."
        if self.values > MOST_VALUES:
            raise self.refuse(line, f"with its aliases written out it has more than {MOST_VALUES:,} values", hint)
        if self.characters > MOST_CHARACTERS:
            what = f"with its aliases written out its values have more than {MOST_CHARACTERS:,} characters"
            raise self.refuse(line, what, hint)

    def remember(self, anchor: str | None, anchored: Anchored) -> None:
        if anchor is not None:
            self.anchors[anchor] = anchored

    def scalar(self, event: Any, line: int) -> Any:
        text, tag = event.value, event.tag
        is_plain = tag is None and event.implicit[0]
        if is_plain and text == "<<" and self.expects_key():
            return MERGE
        if tag in (None, "!", f"{STANDARD}str") and not is_plain:
            return text
        if is_plain and text and text[0] not in BEGINNINGS:
            return text
        wanted = None if is_plain else tag.removeprefix(STANDARD)
        known = [entry for entry in SCALARS if wanted in (None, entry[0])]
        if not known:
            raise self.unknown_tag(tag, line)
        for _, pattern, read in known:
            if pattern.fullmatch(text):
                try:
                    return read(text)
                except ValueError as error:
                    raise self.refuse(line, str(error), "Write a finite number, or put it in quotes.") from None
        if is_plain:
            return text
        raise self.refuse(line, f"is not YAML: {shown(text)} is no {short_tag(tag)}", "Remove the tag.")

    def unknown_tag(self, tag: str, line: int) -> RecipeError:
        return self.refuse(line, f"is not YAML of a recipe: it has the tag {short_tag(tag)}", "Remove the tag.")

    def begin(self, event: Any, line: int) -> None:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{STANDARD}{'map' if is_mapping else 'seq'}"):
            raise self.unknown_tag(event.tag, line)
        if self.expects_key():
            raise self.refuse(line, "has a list or a mapping as a key", "Write a string as the key.")
        if len(self.open) >= MOST_LEVELS:
            raise self.too_deep(line)
        self.open.append(Collection(line, event.anchor, is_mapping, self.values, self.characters))
        self.count(1, 0, line)

    def too_deep(self, line: int) -> RecipeError:
        what = f"has more than {MOST_LEVELS} lists and mappings within each other"
        return self.refuse(line, what, "Write it flatter.")

    def end(self) -> None:
        closed = self.open.pop()
        value = closed.finished()
        values, characters = self.values - closed.values_before, self.characters - closed.characters_before
        self.remember(closed.anchor, Anchored(value, values, characters, closed.levels))
        self.deepen(closed.levels)
        self.place(value, closed.line)

    def deepen(self, levels: int) -> None:
        """Notes how many levels stand below the innermost open collection."""
        if self.open:
            self.open[-1].levels = max(self.open[-1].levels, levels + 1)

    def alias(self, name: str, line: int) -> Any:
        """A copy of what the alias stands for: an override of one place must not reach the others."""
        if any(outer.anchor == name for outer in self.open):
            raise self.refuse(line, f"*{shown(name, quoted=False)} stands within what it means", "Write it out.")
        anchored = self.anchors.get(name)
        if anchored is None:
            what = f"is not YAML: *{shown(name, quoted=False)} means nothing that stands before it"
            raise self.refuse(line, what, f"Write &{shown(name, quoted=False)} before what it shall mean.")
        if len(self.open) + anchored.levels > MOST_LEVELS:
            raise self.too_deep(line)
        self.count(anchored.values, anchored.characters, line)
        self.deepen(anchored.levels)
        return copied(anchored.value)

    def expects_key(self) -> bool:
        return bool(self.open) and self.open[-1].is_mapping and not self.open[-1].has_key

    def place(self, value: Any, line: int) -> None:
        """Puts a finished value where it stands."""
        if not self.open:
            self.document = value
        elif not self.open[-1].is_mapping:
            self.open[-1].items.append(value)
        elif not self.open[-1].has_key:
            self.open[-1].key, self.open[-1].has_key = self.key(value, line), True
        else:
            self.add_entry(self.open[-1], value, line)

    def key(self, value: Any, line: int) -> Any:
        """The key as a string, or `MERGE`; None for one that stands in the mapping already."""
        mapping = self.open[-1]
        if isinstance(value, list | dict):
            raise self.refuse(line, "has a list or a mapping as a key", "Write a string as the key.")
        if not isinstance(value, str) and value is not MERGE:
            self.problem(line, f"the key {shown(value)} is not a string", "Put it in quotes.")
        name = "<<" if value is MERGE else str(value)
        if name in mapping.lines:
            what = (
                f"the key '{shown(name, quoted=False)}' stands here a second time (first on line {mapping.lines[name]})"
            )
            self.problem(line, what, "Remove one.")
            return None
        mapping.lines[name] = line
        return MERGE if value is MERGE else name

    def add_entry(self, mapping: Collection, value: Any, line: int) -> None:
        key, mapping.has_key = mapping.key, False
        if key is MERGE:
            sources = value if isinstance(value, list) else [value]
            if not all(isinstance(source, dict) for source in sources):
                hint = "Write <<: *name, or <<: [*name, *other]."
                raise self.refuse(line, "is not YAML: << takes a mapping, or a list of mappings", hint)
            mapping.merged += sources
        elif key is not None:
            mapping.entries[key] = value


def short_tag(tag: str) -> str:
    """The tag as one writes it."""
    return shown(f"!!{tag.removeprefix(STANDARD)}" if tag.startswith(STANDARD) else tag, quoted=False)


def copied(value: Any) -> Any:
    """A value with lists and mappings of its own, which are no deeper than `MOST_LEVELS`."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def parse_yaml(text: str | bytes, where: str) -> tuple[Any, list[Problem]]:
    """The document, and what is wrong with it that does not keep it from being read.

    Raises `RecipeError` where it is not YAML at all, or holds more than the limits above.
    """
    text = decoded(text, where)
    if len(DIRECTIVE.findall(text)) > MOST_DIRECTIVES:
        raise RecipeError(Problem(where, f"has more than {MOST_DIRECTIVES} lines that begin with %", "Remove them."))
    builder = Builder(where)
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(Problem(f"{where}:{line}", f"is not YAML: {error.problem}", "Mend the line.")) from None
    except yaml.reader.ReaderError as error:
        character = ord(error.character) if isinstance(error.character, str) else error.character
        line = text.count("\n", 0, max(0, text.find(chr(character)))) + 1
        what = f"is not YAML: it holds the character U+{character:04X}"
        raise RecipeError(Problem(f"{where}:{line}", what, "Remove it.")) from None
    except yaml.YAMLError as error:
        raise RecipeError(Problem(where, f"is not YAML: {error}", "Mend the file.")) from None
    return builder.document, builder.problems


def decoded(text: str | bytes, where: str) -> str:
    """The text, without a byte order mark. Raises `RecipeError` if it is none, or too much."""
    if len(text) > MOST_BYTES:
        raise RecipeError(too_large(where, len(text)))
    try:
        if isinstance(text, bytes):
            is_utf16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            return text.decode("utf-16" if is_utf16 else "utf-8-sig")
        text.encode()
        return text.removeprefix("\ufeff")
    except UnicodeError:
        raise RecipeError(Problem(where, "is not text in UTF-8", "Save it as UTF-8.")) from None


def too_large(where: str, size: int) -> Problem:
    what = f"has {size:,} bytes, and {MOST_BYTES:,} are the most that is read"
    return Problem(where, what, "Name files by a pattern instead of listing them.")


def load_yaml(path: Path) -> tuple[Any, list[Problem]]:
    """`parse_yaml` of a file. Raises `RecipeError` if it cannot be read."""
    try:
        text = read_file(path, MOST_BYTES)
    except PathError as error:
        raise RecipeError(*error.problems) from None
    return parse_yaml(text, str(path))
