"""What names on the command line mean: a store, an artifact, a folder, files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import ArtifactError, Problem, StoreError, shown, shown_path
from pipeline.recipe.outside import kind_of_folder
from pipeline.settings.paths import expanded, holds_file, status
from pipeline.store.artifact import MANIFEST, intruders, read_manifest
from pipeline.store.digests import outside_files
from pipeline.store.disk import MOVE
from pipeline.store.proofs import prove
from pipeline.store.store import Store

LONGEST_STORE_BYTES = 3500
"""The longest path that Linux takes has 4,095; what lies in a store takes some hundred of them."""


def open_store(path: Path | None) -> Store:
    """The store, which need not be there yet. Raises `StoreError` or `PathError` where none can be."""
    store = Store(path or Path(os.environ.get("SLIPWAY_STORE") or "runs"))
    if len(os.fsencode(store.folder)) > LONGEST_STORE_BYTES:
        what = "is too long for a store: paths below it could not be used"
        raise StoreError(Problem(shown_path(store.folder), what, MOVE))
    return store


def model_folder(name: str, store: Path | None) -> tuple[Path, list[str]]:
    """The folder of a model, or of the artifact or step of this name, and what is to be said of it.

    Raises a `SlipwayError` where it can be none, or is an artifact of a store that is not what was written.
    """
    path = Path(name)
    if not holds_file(path, "config.json"):
        folder = open_store(store).resolve(name)[1]
        return folder, differences(folder)
    if not holds_file(path, MANIFEST):
        kind_of_folder(path)
    outside_files(path)
    return path, differences(path)


def differences(folder: Path) -> list[str]:
    """A sentence if the folder is a copy of an artifact and was edited: it is then a model of its own, as in a recipe.

    Files are hashed, unless that is remembered. Raises `ArtifactError` if it is the artifact itself, in its store.
    """
    is_original = folder.absolute().parent.name == "artifacts"
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        if is_original:
            raise
        return []
    damaged, added = [*prove(folder, manifest)], intruders(folder, manifest.files)
    if not is_original:
        edited = ", ".join([*damaged, *added])
        return [f"{shown_path(folder)} differs from its manifest: {edited}"] if edited else []
    problems = []
    if damaged:
        hint = "Run the recipe again: it makes the artifact anew, as `slipway plan` now says."
        what = f"is damaged: {', '.join(damaged)} not as written"
        problems.append(Problem(shown_path(folder), what, hint))
    problems += [
        Problem(shown_path(folder / name), "was added and would be read", "Move it elsewhere.") for name in added
    ]
    if problems:
        raise ArtifactError(*problems)
    return []


def place_of(name: str, store: Store) -> str:
    """The path that is meant: what lies there, a pattern, or the folder of an artifact or step of this name.

    Raises `PathError` or `ArtifactError` where it can be none of these.
    """
    path = expanded(name)
    if name and (re.search(r"[*?\[]", name) or status(path) is not None):
        return str(path)
    try:
        return str(store.resolve(name)[1])
    except ArtifactError as error:
        if "no artifact or step" not in str(error):
            raise
        what = f"no file or folder, and no artifact or step of this name in {store.folder}"
        hint = "Correct the path; `slipway status` lists artifacts; --store names another store."
        raise ArtifactError(Problem(shown(name, quoted=False), what, hint)) from None
