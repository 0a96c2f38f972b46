"""Where rows come from: the running Python, files, a `datasets` folder, the hub. Imports neither torch nor readers."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializationInfo,
    ValidationInfo,
    field_serializer,
    model_validator,
)

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.settings.paths import is_file
from pipeline.settings.strict import OutsideFolder, OutsidePath, Strict, expand_globs
from pipeline.store.artifact import files_below
from stages.lib.sources.encodings import TEXT_TYPES, known_encoding
from stages.lib.sources.layouts import LAYOUTS, Layout

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".conll": "conll",
}
"""Suffix -> file type, which is a key of `READERS` in files.py. Each may be followed by .gz or .zst."""


if TYPE_CHECKING:
    FileType = str
else:
    FileType = Literal[tuple(dict.fromkeys(SUFFIXES.values()))]


COMPRESSIONS = (".gz", ".zst")


OTHER_COMPRESSIONS = {".xz": "xz", ".bz2": "bzip2", ".lz4": "lz4", ".7z": "7-Zip", ".zip": "zip"}
"""Suffix -> what nothing here decompresses."""


SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
"""These, and hidden files and folders, are no part of a folder's digest, so nothing is read from them either."""


def expand(value: Any, info: ValidationInfo) -> Any:
    """Patterns as the files they match; whatever is no list of strings is left for pydantic to report."""
    if isinstance(value, list) and all(isinstance(pattern, str) for pattern in value):
        return expand_globs(value, info)
    return value


def default_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


class PythonDocsSource(Strict):
    """Texts, chats, prompts, preferences in pairs or not, labels, spans or questions made from Python sources and their docstrings."""

    kind: Literal["python_docs"]
    """The sources of a Python tree, read with `ast`: nothing is imported or executed."""
    root: OutsideFolder = Field(default_factory=default_root)
    """Folder of the sources. Default: the standard library of the running Python."""
    packages: list[str] | None = None
    """Top-level packages and modules to read. null: all of them."""
    answers: Literal["text", "json"] = Field(default="text", exclude_if=lambda answers: answers == "text")
    """What the assistant says in chats. json: the name and the parameters of a function, extracted from how it is called."""

    @property
    def given_format(self) -> str | None:
        """The format that the layout gives; None where every format can be made."""
        return "chats" if self.answers == "json" else None


class LaidOutSource(Strict):
    """What sources of raw rows have in common."""

    layout: str
    """How a raw row is laid out: text, alpaca, messages, sharegpt, rated_chat, prompts, preference_alpaca, preference_between, preference_chat, unpaired_preference, rated_answer, stepwise, math_shepherd, prm800k, label, relation, spans, bio, pieces or squad. It decides the format of the rows; data_recipes/README.md shows each."""
    columns: dict[str, str] = {}
    """Renames columns: the layout's name -> the name in the data. `id` and `group` may be named too: rows with the same group stay on one side of the held-out split."""
    carry: list[str] = []
    """Columns that travel along unchanged, by their names in the data: a row keeps them in its `columns`, where rewards such as exact_match read them; `reward_model.ground_truth` is what stands within another one. They hold texts, numbers or truth values; a row that lacks one, or has something else in it, is dropped."""
    token_separator: str | None = None
    """What stands between two tokens when a text is made of them (layouts bio and relation). null: one space; '' for Chinese characters."""
    strip_segment_digit: bool = False
    """Whether each token ends with a digit that is no part of it, as in the Weibo NER files (layout bio)."""
    turns_in_text: Literal["json", "transcript"] | None = None
    """What texts hold where the layout takes texts or turns (rated_chat, prompts, preference_chat, unpaired_preference, rated_answer, stepwise): turns as JSON, or a transcript of `Human:` and `Assistant:`. Other texts stay texts. null: all texts are what they say, also if they look like turns."""
    unlabelled: bool = False
    """Whether the rows are yet to be labelled, by the stage `annotate` (layouts label and squad): their label, or their answers, are not read, and may be missing. Texts without a second one need no such word: read them with the layout text."""
    first_answer: float | None = Field(default=None, allow_inf_nan=False)
    """What `preference` says of a row whose first answer (output_1) is the better one (layout preference_between), such as 0, or -3 of a scale from -3 to 3. With 1 also 0 is a tie. null: 1, and where the numbers are only ever 0 and 1 the stage stops and asks. Words as model_a and tie need neither this nor `second_answer`."""
    second_answer: float | None = Field(default=None, allow_inf_nan=False)
    """What `preference` says where the second one is: the other end of the scale, above `first_answer` or below it. null: `first_answer` + 1."""
    no_label: list[str] | None = None
    """Labels that say that a row has none (layouts label and relation): such rows are dropped and counted. null: - and -1, as SNLI and `datasets` write it. []: each label is a class."""
    span_offsets: Literal["inclusive", "utf16", "utf8"] | None = None
    """How spans count that do not say their text (layout spans): with an `end` that is their last character (inclusive), in UTF-16 units as browsers and Java do (utf16), or in bytes of UTF-8 (utf8). null: half-open, in characters."""
    rating_columns: list[str] | None = Field(default=None, min_length=1, exclude_if=lambda names: names is None)
    """The columns that hold ratings, by their names in the data, such as [helpfulness, correctness] (layout rated_answer): each is an attribute of that name. null: the column ratings holds a number, or a mapping of attributes to numbers."""
    max_row_bytes: int = Field(default=8 << 20, ge=1)
    """Rows of more bytes than this are dropped without being parsed."""
    max_broken_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share of broken rows (bad JSON, missing fields, ...), from 0 to 1. With more than this the stage stops."""

    @property
    def laid_out(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def given_format(self) -> str | None:
        return self.laid_out.format

    @model_validator(mode="after")
    def check_layout(self) -> LaidOutSource:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: there is no '{self.layout}' ({did_you_mean(self.layout, LAYOUTS)})")
        known = (*self.laid_out.columns, "id", "group")
        for name in self.columns:
            if name not in known:
                raise ValueError(f"columns: the layout {self.layout} has no '{name}' ({did_you_mean(name, known)})")
        for option, is_set in (
            ("token_separator", self.token_separator is not None),
            ("strip_segment_digit", self.strip_segment_digit),
            ("turns_in_text", self.turns_in_text is not None),
            ("unlabelled", self.unlabelled),
            ("first_answer", self.first_answer is not None),
            ("second_answer", self.second_answer is not None),
            ("no_label", self.no_label is not None),
            ("span_offsets", self.span_offsets is not None),
            ("rating_columns", self.rating_columns is not None),
        ):
            if is_set and option not in self.laid_out.options:
                users = ", ".join(name for name, layout in LAYOUTS.items() if option in layout.options)
                raise ValueError(f"{option}: the layout {self.layout} does not use it. Layouts that do: {users}.")
        if self.second_answer is not None and self.second_answer == self.first_answer:
            raise ValueError(
                "second_answer: is what first_answer is. Name the two ends of the scale, such as -3 and 3."
            )
        if self.second_answer is not None and self.first_answer is None:
            raise ValueError("second_answer: stands without first_answer. Name the other end of the scale as well.")
        return self


class FilesSource(LaidOutSource):
    """Files on this machine."""

    kind: Literal["files"]
    """Files: JSON lines, JSON, CSV, TSV, Parquet, text or CoNLL, each also as .gz or .zst."""
    paths: Annotated[list[OutsidePath], BeforeValidator(expand)] = Field(min_length=1)
    """Files, folders (read with everything below them) or glob patterns."""
    file_type: FileType | None = None
    """What the files are. null: told by the suffix (jsonl, ndjson, json, csv, tsv, parquet, txt, md, conll)."""
    encoding: Annotated[str, AfterValidator(known_encoding)] | None = None
    """How text files are encoded, as Python names it: latin-1, gb18030, utf-16, ... null: UTF-8. Rows that are not are dropped and counted, with what the file looks like."""
    split_text: Literal["file", "paragraph", "line"] | None = None
    """What becomes a row of a text file: the whole file, each paragraph between blank lines, or each line. null: the file."""
    records: str | None = Field(default=None, min_length=1)
    """Where in a JSON document the list of rows stands: names separated by dots. `*` is every name, which becomes the row's column `key`. null: the document is the list, or it is one record."""
    has_header: bool = True
    """Whether the first row of a CSV or TSV file names the columns, each with a name of its own. If not, they are called 0, 1, 2, ..."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What stands between the fields of a CSV or TSV file, one character. null: a comma in CSV, a tab in TSV. With tabs and `file_type: csv` quotation marks may enclose fields."""
    max_fields: int | None = Field(default=None, ge=2)
    """Into how many fields a line of a TSV file is cut at most; what follows is part of the last. With `delimiter: " "` and 2, a line is a label and a text: `NUM:date When was he born ?`. null: at every delimiter."""
    token_column: int = 0
    """Column of the token in a CoNLL file, from 0; negative ones count from the end."""
    tag_column: int = -1
    """Column of the tag in a CoNLL file, from 0; negative ones count from the end."""
    comment_prefix: str | None = Field(default=None, min_length=1)
    """How lines of a CoNLL file begin that are comments, such as `# `. null: it has none, and every line is a token."""
    allow_damaged_files: bool = False
    """Whether to go on with what stands before the place where a file breaks off, such as a .gz that was not copied whole. If not, such a file stops the stage."""

    @field_serializer("file_type")
    def told_by_names(self, file_type: FileType | None, info: SerializationInfo) -> str | None:
        """In an identity (where the context is a digest function) also what only the names of single files say: the same
        bytes are other rows as text than as JSON lines. A folder's digest holds the names in it.
        """
        if not callable(info.context):
            return file_type
        told = [str(file_type or type_of(path)) + compression_of(path) for path in self.paths if not path.is_dir()]
        return ",".join(told if len(set(told)) > 1 else told[:1]) or file_type

    def files(self) -> list[tuple[Path, str, FileType]]:
        """(path, name in messages, file type) of every file, in order.

        Raises `DataError` where a type cannot be told, a file cannot be read, or an option is for files of other types.
        """
        found = [
            file
            for path in self.paths
            for file in (self.files_in(path) if path.is_dir() else [self.file(path, path.name)])
        ]
        if problems := list(self.unused_options({file_type for _, _, file_type in found})):
            raise DataError(*problems)
        return found

    def file(self, path: Path, name: str) -> tuple[Path, str, FileType]:
        found = self.file_type or type_of(path)
        if found is None and (packed := OTHER_COMPRESSIONS.get(path.suffix.lower())):
            hint = "Decompress it, or pack it as .gz or .zst."
            raise DataError(Problem(str(path), f"is compressed with {packed}, which is not read", hint))
        if found is None:
            raise DataError(Problem(str(path), "has no suffix that says what it is", "Set file_type, or rename it."))
        return path, name, found

    def files_in(self, folder: Path) -> list[tuple[Path, str, FileType]]:
        """The files below a folder that have the file type; without one given, all must have the same."""
        visible = [path for path in files_below(folder) if is_visible(path.relative_to(folder))]
        typed = [(path, f"{folder.name}/{path.relative_to(folder).as_posix()}", type_of(path)) for path in visible]
        wanted = self.file_type
        if wanted is None:
            types = sorted({found or f"*{path.suffix}" for path, _, found in typed})
            if len(types) > 1:
                hint = f"Name a pattern such as {folder.name}/*.jsonl, or set file_type to read only those of one type."
                raise DataError(Problem(str(folder), f"holds files of several types: {', '.join(types)}", hint))
            wanted = next((found for _, _, found in typed), None)
        chosen = [(path, name, wanted) for path, name, found in typed if wanted and found == wanted]
        if not chosen:
            what = f"holds no {wanted or 'data'} file"
            raise DataError(Problem(str(folder), what, f"Known suffixes: {', '.join(SUFFIXES)}."))
        for path, _, _ in chosen:
            if not is_file(path):
                raise DataError(Problem(str(path), "is a link that leads nowhere", "Mend the link, or remove it."))
        return chosen

    def unused_options(self, types: set[FileType]) -> Iterator[Problem]:
        """The options that are for files of other types than the source has."""
        for option, is_set, users in (
            ("split_text", self.split_text is not None, {"text"}),
            ("encoding", self.encoding is not None, TEXT_TYPES),
            ("records", self.records is not None, {"json"}),
            ("has_header", not self.has_header, {"csv", "tsv"}),
            ("delimiter", self.delimiter is not None, {"csv", "tsv"}),
            ("max_fields", self.max_fields is not None, {"tsv"}),
            ("comment_prefix", self.comment_prefix is not None, {"conll"}),
            ("token_column", self.token_column != 0, {"conll"}),
            ("tag_column", self.tag_column != -1, {"conll"}),
        ):
            if is_set and not users & types:
                what = f"is for {' and '.join(sorted(users))} files, and none of the files is one"
                yield Problem(option, what, "Remove it.")


class DatasetSource(LaidOutSource):
    """A data set that the `datasets` library saved."""

    kind: Literal["dataset"]
    """A folder that `save_to_disk` of the `datasets` library wrote."""
    path: OutsideFolder
    """The folder."""
    split: str | None = None
    """Its split, such as train. null: the folder holds one data set without splits."""


class HubSource(LaidOutSource):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    """A data set of the Hugging Face hub, at one fixed revision."""
    dataset: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")
    """Its id, such as HuggingFaceH4/ultrachat_200k."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """The commit, 40 hexadecimal digits: what a branch means today is not what it means tomorrow."""
    split: str = "train"
    """Its split."""
    config: str | None = None
    """Its configuration (subset). null: the default one."""


Source = Annotated[PythonDocsSource | FilesSource | DatasetSource | HubSource, Field(discriminator="kind")]
"""A block of `kind` and the fields of that kind."""


def type_of(path: Path) -> FileType | None:
    """The file type that the suffix says, compression aside."""
    suffixes = path.suffixes[:-1] if compression_of(path) else path.suffixes
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def compression_of(path: Path) -> str:
    """The suffix that says how the file is compressed; "" if it is not."""
    return path.suffix if path.suffix in COMPRESSIONS else ""


def is_visible(relative: Path) -> bool:
    return not any(part.startswith(".") or part in SKIPPED_FOLDERS for part in relative.parts)
