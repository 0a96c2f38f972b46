"""What names on the command line mean: a store, an artifact, a folder, files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ArtifactError, Problem, StoreError, shown, shown_path
from pipeline.recipe.outside import ADAPTER, kind_of_folder, weights_problem
from pipeline.recipe.weight_files import weights_in
from pipeline.settings.paths import expanded, holds_file, read_json, status
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


NO_ADAPTER = "none"
"""What stands for a model without an adapter, so that none is called so."""


def model_to_talk_to(model: str, store: Path | None) -> tuple[Path, list[str]]:
    """The folder of a model, as `model_folder` gives it. Raises `ArtifactError` where it is an adapter, or what `plan` would
    refuse of a model from elsewhere: weights that cannot be read, or an adapter beside them.
    """
    place, notes = Path(model), list[str]()
    if not holds_file(place, ADAPTER) or holds_file(place, "config.json"):
        place, notes = model_folder(model, store)
    if holds_file(place, ADAPTER) and not weights_in(place):
        base = read_json(place / ADAPTER).get("base_model_name_or_path") or "MODEL"
        hint = f"Name the model that it was trained on: `slipway chat {base} --adapter {model}`."
        raise ArtifactError(Problem(shown(model, quoted=False), "is an adapter, and no model", hint))
    if not holds_file(place, MANIFEST) and (problem := weights_problem(place)):
        raise ArtifactError(Problem(shown(model, quoted=False), problem))
    return place, notes


def adapters_to_talk_to(adapters: Sequence[str], store: Path | None) -> tuple[dict[str, Path], list[str]]:
    """Name -> folder of adapters, given as PLACE, whose last part is the name, or NAME=PLACE; and what is to be said of them.

    Raises a `SlipwayError` where one is no adapter, is damaged, or two have one name.
    """
    found: dict[str, Path] = {}
    notes = []
    for each in adapters:
        name, wanted = name_and_place(each)
        place = Path(wanted)
        here = holds_adapter(place) or holds_file(place, "config.json")
        home = place if here else open_store(store).resolve(wanted)[1]
        if not holds_adapter(home):
            what = f"{shown_path(home)} holds no adapter: there is no {ADAPTER}"
            raise ArtifactError(Problem(f"--adapter {shown(each, quoted=False)}", what, "Name another one."))
        if name in (*found, NO_ADAPTER, ""):
            reasons = {NO_ADAPTER: "'none' stands for no adapter", "": "the last part of its path is no name"}
            what = reasons.get(name, f"two adapters are called {shown(name)}")
            hint = f"Give it a name of its own: `--adapter NAME={wanted}`."
            raise ArtifactError(Problem(f"--adapter {shown(each, quoted=False)}", what, hint))
        notes += differences(home)
        found[name] = home
    return found, notes


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter lies in the folder, alone or beside a whole model."""
    return holds_file(folder, ADAPTER) or holds_file(folder / "adapter", ADAPTER)


def name_and_place(given: str) -> tuple[str, str]:
    """An adapter's name in a chat, and where it is: of NAME=PLACE, unless the whole of it is a place."""
    name, sign, place = given.partition("=")
    if sign and "/" not in name and status(expanded(given)) is None:
        return name, place
    return Path(given).name, given


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
