"""Are a step's inputs still what its id says? Asked when it starts, before anything is read from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ArtifactError, PathError, Problem, SlipwayError
from pipeline.figures import size
from pipeline.recipe.recipe import HUB
from pipeline.store.artifact import MANIFEST, intruders, read_manifest
from pipeline.store.digests import Digests, cache_file
from pipeline.store.job import Job
from pipeline.store.journal import Journal
from pipeline.store.proofs import prove, unproven_bytes

SAID_BYTES = 1_000_000_000
"""From here on hashing takes seconds, and is said."""


def prove_inputs(job: Job, journal: Journal, look_up_from_it: Callable[[], object]) -> None:
    """Hashes what the job reads, unless that is remembered. Raises one `ArtifactError` with everything that is not as it was
    when the job was planned.

    `look_up_from_it` is called before each input, and may raise where the job is to stop.
    """
    problems: list[Problem] = []
    digests = Digests(cache_file())
    for role, place in job.inputs.items():
        look_up_from_it()
        if place.startswith(HUB):
            continue
        expected = job.input_ids[role]
        if expected.startswith("sha256:"):
            problems += outside_problems(f"inputs.{role}", Path(place), expected, digests)
        else:
            problems += artifact_problems(role, Path(place), expected, job, journal)
    for name, source in job.source_digests.items():
        expected, _, place = source.partition(" ")
        problems += outside_problems(f"params.{name}", Path(place), expected, digests)
    digests.save()
    if problems:
        raise ArtifactError(*problems)


def outside_problems(where: str, path: Path, expected: str, digests: Digests) -> list[Problem]:
    try:
        found = digests.of(path)
    except PathError as error:
        found = f"it cannot be read: {error}"
    if found == expected:
        return []
    what = f"{path} has changed since the step was planned"
    if not found.startswith("sha256:"):
        what += f" ({found})"
    return [Problem(where, what, "Run the recipe again: it is planned with what lies there now.")]


def artifact_problems(role: str, folder: Path, expected: str, job: Job, journal: Journal) -> list[Problem]:
    """What is wrong with an input that is an artifact, by file."""
    where = f"inputs.{role}"
    is_ours = folder.parent == Path(job.store) / "artifacts"
    again = "Run the recipe again: what is damaged is then made anew first, as `slipway plan` now says."
    if not is_ours:
        again = "Put back what it held, or plan again: as it lies there it is an input of its own."
    if not (folder / MANIFEST).is_file():
        return [Problem(where, f"{folder} is no longer there", again)]
    try:
        manifest = read_manifest(folder)
    except SlipwayError as error:
        return [Problem(where, str(error), again)]
    if manifest.artifact_id != expected:
        return [Problem(where, f"{folder} holds the artifact {manifest.artifact_id[:12]}, not {expected[:12]}", again)]
    if (unproven := unproven_bytes(folder, manifest)) > SAID_BYTES:
        journal.note(f"hashing the input '{role}' ({size(unproven)}), once")
    problems = [
        Problem(where, f"{folder / name} {what}: the artifact is damaged", again)
        for name, what in prove(folder, manifest).items()
    ]
    return problems + [
        Problem(where, f"{folder / name} was added to the artifact and would be read", "Move it elsewhere.")
        for name in intruders(folder, manifest.files)
    ]
