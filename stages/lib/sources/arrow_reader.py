"""Reads Parquet files, and data sets of the `datasets` library from a folder or from the hub."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Problem
from stages.lib.sources.lines import Broken, Damaged, Limits, Record, blocks_of

if TYPE_CHECKING:
    import pyarrow

    from stages.lib.sources.params import DatasetSource, FilesSource, HubSource


ARROW_BATCH_ROWS = 64


def read_parquet(path: Path, name: str, source: FilesSource, limits: Limits) -> Iterator[Record | Broken]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        file: Any = path
        if path.suffix in (".gz", ".zst"):
            for block in blocks_of(path):
                unpacked.write(block)
            file = unpacked
            unpacked.seek(0)
        start = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                refuse_repeated_names(table.schema_arrow.names, name)
                names, noticed = named_classes(table.schema_arrow)
                for batch in table.iter_batches(batch_size=ARROW_BATCH_ROWS):
                    yield from arrow_rows(batch, name, start, limits, names, noticed)
                    start += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise Damaged(str(error)) from None


def refuse_repeated_names(names: list[str], where: str) -> None:
    """Raises `DataError` where two columns have one name: which of them is meant cannot be told."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        listed = ", ".join(f"'{name}'" for name in repeated)
        what = f"has more than one column {listed}"
        raise DataError(Problem(where, what, "Write it again with a name of its own for each."))


def named_classes(schema: pyarrow.Schema) -> tuple[dict[str, Callable[[Any], Any]], tuple[str, ...]]:
    """`class_names` of the features that the `datasets` library writes into the Parquet files it makes, and a notice of each
    that the installed one does not know: its column is read as Arrow has it.
    """
    described = (schema.metadata or {}).get(b"huggingface", b"")
    if b"ClassLabel" not in described:
        return {}, ()
    import datasets

    try:
        features = json.loads(described)["info"]["features"]
        known = {column: feature for column, feature in features.items() if column in schema.names}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, ("the file's description of its features cannot be read: numbers of classes stay numbers",)
    found: dict[str, Any] = {}
    noticed = []
    for column, feature in known.items():
        try:
            found |= datasets.Features.from_dict({column: feature})
        except Exception as error:  # the library raises many kinds for what it does not know
            what = f"column '{column}' is read as it stands: the installed `datasets` does not know its feature"
            noticed.append(f"{what} ({first_line(error).partition('. ')[0]})")
    return class_names(found), tuple(noticed)


def arrow_rows(
    batch: pyarrow.RecordBatch,
    name: str,
    start: int,
    limits: Limits,
    names: dict[str, Callable[[Any], Any]] | None = None,
    noticed: tuple[str, ...] = (),
) -> Iterator[Record | Broken]:
    """The rows of a batch, numbered from `start` + 1. Oversized ones are passed over before they become objects.

    Bytes that are no UTF-8 stay bytes: only a layout that reads their column needs them as text.
    """
    import pyarrow

    for index in range(batch.num_rows):
        where = f"{name}:{start + index + 1}"
        one = batch.slice(index, 1)
        if one.nbytes > limits.row_bytes:
            yield Broken(where, "row_too_long", f"{one.nbytes:,} bytes")
            continue
        column = ""
        try:
            row = {}
            for column, values in zip(one.schema.names, one.columns, strict=True):
                row[column] = plain_value(python_value(values))
                if names and column in names:
                    row[column] = names[column](row[column])
        except (pyarrow.ArrowException, ValueError) as error:
            yield Broken(where, "wrong_type", f"{column}: {error}")
            continue
        if all(value is None for value in row.values()):
            yield Broken(where, "empty_row", "")
        else:
            yield Record(where, row, noticed)


def python_value(values: pyarrow.Array) -> Any:
    """The first value. Of a text that is no UTF-8, as far as Arrow was told that it is one, its bytes."""
    try:
        return values[0].as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def plain_value(value: Any) -> Any:
    """The value with bytes decoded, all the way down, where they are UTF-8.

    Fields of mappings that hold nothing are left out: Arrow gives each mapping of a column all fields that any has.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {name: plain_value(item) for name, item in value.items() if item is not None}
    return value


def read_dataset(source: DatasetSource, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    hint = "Name a folder that `datasets`' save_to_disk wrote."
    try:
        loaded = datasets.load_from_disk(str(source.path))
    except Exception as error:  # the library raises many kinds for a folder that is not whole
        raise DataError(Problem(str(source.path), f"cannot be opened: {first_line(error)}", hint)) from None
    if isinstance(loaded, datasets.DatasetDict):
        known = ", ".join(loaded)
        if source.split is None:
            raise DataError(Problem(str(source.path), f"has several splits: {known}", "Name one as `split`."))
        if source.split not in loaded:
            raise DataError(Problem(str(source.path), f"has no split '{source.split}'", f"It has: {known}."))
        loaded = loaded[source.split]
    elif source.split is not None:
        raise DataError(Problem(str(source.path), "has no splits", "Leave `split` out."))
    yield from dataset_rows(loaded, source.path.name, limits)


def read_hub(source: HubSource, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a data set of the Hugging Face hub, at exactly the revision that the recipe names."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # network, authorization, missing split or config: all are told alike
        hint = "Check the id, the revision, the split and the config, and that this machine reaches the hub."
        where = f"{source.dataset}@{source.revision}"
        raise DataError(Problem(where, f"cannot be loaded: {first_line(error)}", hint)) from None
    yield from dataset_rows(loaded, source.dataset, limits)


def dataset_rows(dataset: Any, name: str, limits: Limits) -> Iterator[Record | Broken]:
    """The rows of a `datasets.Dataset`; numbers of class labels become their names."""
    import pyarrow

    names = class_names(dataset.features)
    start = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=ARROW_BATCH_ROWS):
            for batch in table.to_batches():
                yield from arrow_rows(batch, name, start, limits, names)
                start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield Broken(name, "damaged_file", f"{first_line(error)} (after row {start})")


def class_names(features: Mapping[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """Column -> what gives its class labels their names, alone, in lists or in mappings; nothing of other columns."""
    found = {name: namer(feature) for name, feature in features.items()}
    alone = {name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    return {name: with_none(name_of) if name in alone else name_of for name, name_of in found.items() if name_of}


def with_none(name_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same for a label that stands alone: -1 stays what it is, as in files that hold numbers, and `no_label` is asked of it."""
    return lambda value: "-1" if value == -1 else name_of(value)


def namer(feature: Any) -> Callable[[Any], Any] | None:
    """What turns a value of this feature into one with names in place of numbers; None where there are no class labels."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return lambda value: class_name(value, feature.names or [])
    if isinstance(feature, dict):
        inner = class_names(feature)
        return inner and (
            lambda value: value and {name: inner.get(name, unchanged)(item) for name, item in value.items()}
        )
    within = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    name_of = namer(within) if within is not None else None
    return name_of and (lambda value: [name_of(item) for item in value] if isinstance(value, list) else value)


def class_name(value: Any, names: list[str]) -> str | None:
    """The name of a class, None for -1, by which `datasets` says that there is none. Raises `ValueError` for other numbers."""
    if value is None or value == -1:
        return None
    if isinstance(value, int | float) and 0 <= value < len(names) and value == int(value):
        return names[int(value)]
    raise ValueError(f"there is no class {value!r:.40} among {len(names):,}")


def unchanged(value: Any) -> Any:
    return value


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
