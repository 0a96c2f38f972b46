"""What lies at a path, as the fields that name it in a source: files, folders of files, a saved data set."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, PathError, Problem, shown_path
from pipeline.settings.paths import expanded, is_file, kind_of_file, matching, read_json, status
from pipeline.settings.strict import Reading, validate
from pipeline.store.artifact import files_below
from stages.lib.sources.params import SUFFIXES, DatasetSource, FilesSource, LaidOutSource, is_visible, type_of
from stages.lib.sources.proposing.json_places import SPLITS
from stages.lib.sources.proposing.looking import ReaderChoice, choices_for

TRAINING = frozenset({"train", "training"})


SPLIT_NAMES = TRAINING | {"validation", "valid", "val", "dev", "test", "eval"}
"""What files that are parts of a data set are called."""


SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files of a folder that `save_to_disk` of the `datasets` library wrote: one data set, or several splits."""


ABOUT_DATA = frozenset({"README", "LICENSE", "LICENCE", "CHANGELOG", "NOTICE"})
"""Files with these names say something of the data beside them."""


READER_OPTIONS = (FilesSource.model_fields.keys() - LaidOutSource.model_fields.keys()) | {"max_row_bytes"}
"""Fields of a source that say how files are read; the others say what rows mean."""


def readings_of(names: Sequence[str], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[ReaderChoice], list[str]]:
    """(fields that name the data, how it may be read, what to know of that).

    Raises `PathError` or `DataError` for what is not there, is no data, or is of several kinds.
    """
    places = [absolute(name) for name in names]
    if len(places) == 1 and is_saved(place := Path(places[0])):
        return saved_data_set(place, given)
    files, others, options = [], [], {}
    for place in places:
        for path in paths_at(place):
            if not path.is_dir():
                files.append(path)
                continue
            chosen, rest = files_of_one_type(path, given)
            files += chosen
            others += rest
    # What is given is tried before anything is read with it.
    read_with = {name: value for name, value in given.items() if name in READER_OPTIONS}
    source_of({"kind": "files", "layout": "text", **read_with, "paths": places})
    choices = choices_for(files[0], read_with, alone=len(files) == 1)
    notes = []
    if len(files) > 1:
        notes.append(f"{len(files):,} files; how they are read is told by the first, {files[0].name}")
    notes += note_of_splits(files)
    if others and "file_type" not in given:
        options["file_type"] = type_of(files[0])
        notes.append(f"{len(others):,} files beside these are not read: {counted(others)}")
    return {"kind": "files", "paths": list(places), **options}, choices, notes


def note_of_splits(files: Sequence[Path]) -> list[str]:
    """What to know of files whose names look like the parts of a data set: rows to test with would be trained on."""
    found: dict[str, list[Path]] = {}
    for path in files:
        if split := split_of(path):
            found.setdefault(split, []).append(path)
    heldout = [name for name in found if name not in TRAINING]
    if len(found) < 2 or not heldout:
        return []
    listed = ", ".join(
        f"{name} ({paths[0].name if len(paths) == 1 else f'{len(paths):,} files'})" for name, paths in found.items()
    )
    parts = f"these names look like official splits, and are read here as one source: {listed}"
    way = f"To hold one out whole, such as {heldout[0]}, inspect and `clean` it by itself"
    return [f"{parts}. {way}, and name that `clean` in heldout_sources of the stage `mix`"]


def split_of(path: Path) -> str | None:
    """The part of a data set that a file's name, or its folder's, says it is."""
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].lower())
    folder = path.parent.name.lower()
    return next((word for word in [*words, folder] if word in SPLIT_NAMES), None)


def absolute(name: str) -> str:
    """The path or pattern in full, as `paths` of a source takes it: of a file that is there, without meaning as a pattern."""
    path = os.path.abspath(expanded(name))
    found = status(path)
    if found is None:
        return path
    if other := kind_of_file(found):
        raise PathError(Problem(shown_path(name), f"is {other}, and a file or folder is needed", "Name another."))
    return glob.escape(path)


def paths_at(place: str) -> list[Path]:
    """The files and folders that a path or pattern means. Raises `PathError` where there are none."""
    found = [Path(path) for path in (matching(Path(place)) if glob.has_magic(place) else [place])]
    if not any(status(path) for path in found):
        raise PathError(Problem(shown_path(place), "is not there", "Correct the path."))
    return found


def files_of_one_type(folder: Path, given: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """(the data files below a folder, the others). Raises `DataError` where there are none, or of several types."""
    try:
        files = [path for path in files_below(folder) if is_visible(path.relative_to(folder)) and is_file(path)]
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise PathError(Problem(shown_path(folder), what, "Check its permissions.")) from None
    types = Counter(found for path in files if path.stem.upper() not in ABOUT_DATA and (found := type_of(path)))
    wanted = given.get("file_type") or (types.most_common(1)[0][0] if types else None)
    if len(types) > 1 and "file_type" not in given:
        listed = ", ".join(f"{count:,} {name}" for name, count in types.most_common())
        suffix = next(path.suffix for path in files if type_of(path) == wanted)
        hint = f"Inspect those of one type: slipway inspect '{folder}/**/*{suffix}', or --set file_type={wanted}."
        raise DataError(Problem(shown_path(folder), f"holds files of several types: {listed}", hint))
    chosen = [path for path in files if wanted is not None and type_of(path) == wanted]
    others = [path for path in files if path not in set(chosen)]
    if not chosen:
        there = f" (there are {counted(others)})" if others else ""
        hint = f"Known suffixes: {', '.join(SUFFIXES)}. Other files are inspected one by one."
        raise DataError(Problem(shown_path(folder), f"holds no {wanted or 'data'} file{there}", hint))
    return chosen, others


def counted(files: Sequence[Path]) -> str:
    """`3 .log, 1 .md`"""
    suffixes = Counter(path.suffix or "without suffix" for path in files)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(5))


def is_saved(folder: Path) -> bool:
    return folder.is_dir() and any(is_file(folder / name) for name in (SAVED, SAVED_SPLITS))


def saved_data_set(folder: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[ReaderChoice], list[str]]:
    """A folder that `save_to_disk` wrote; of several splits the one for training, or the first."""
    block: dict[str, Any] = {"kind": "dataset", "path": str(folder)}
    notes = []
    if not is_file(folder / SAVED):
        splits = read_json(folder / SAVED_SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits) or not splits:
            raise DataError(Problem(shown_path(folder / SAVED_SPLITS), "names no splits", "Save the data set again."))
        ranked = sorted(splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))
        block["split"] = given.get("split", ranked[0])
        notes.append(f"its splits are {', '.join(splits)}; {block['split']} is looked at")
    return block, [ReaderChoice({}, ["`datasets` saved it"])], notes


def source_of(block: Mapping[str, Any]) -> LaidOutSource:
    """The source that a block means. Raises `DataError` with everything that is wrong with it."""
    model = DatasetSource if block.get("kind") == "dataset" else FilesSource
    source, problems = validate(model, dict(block), "source", Reading([]))
    if source is None or problems:
        raise DataError(*problems)
    return source
