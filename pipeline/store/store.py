"""Where things live. The only module that writes below the store, apart from the stage's own work folder.

runs/
  artifacts/<artifact id>/        immutable; manifest.json was written last, the folder appeared by one rename
  work/<step>-<first 8 of id>/    of a step that runs or was interrupted: see work_folder.py
  recipes/<name>-<digest>.json    the plan each recipe last ran, with and without --set: step -> artifact and its identity
  proofs/<artifact id>.json       what its files are known to hold, so that each is hashed once
  tracking/<tracker>/<recipe>/<step>-<first 8 of id>/   what a tracker keeps in files
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, PathError, Problem, StoreError, shown_path
from pipeline.settings.paths import expanded, holds_file, status
from pipeline.store.artifact import MANIFEST, Facts, Manifest, list_files, read_manifest, sealed
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.disk import CHANGE_RIGHTS, MOVE, writing
from pipeline.store.durable import let_others_read, make_folder, sync, sync_below, write_text
from pipeline.store.job import Job
from pipeline.store.numbers import require_finite
from pipeline.store.proofs import known_damage
from pipeline.store.provenance import git_state, library_versions
from pipeline.store.records import Records, end_plan, read_records, record_plan
from pipeline.store.work_folder import Running, WorkFolder, remove


class Store:
    """A folder of artifacts and of the work that makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = usable(folder)
        self.artifacts = self.folder / "artifacts"
        self.work = self.folder / "work"
        self.recipes = self.folder / "recipes"

    # Finding

    def artifact_folder(self, artifact_id: str) -> Path:
        return self.artifacts / artifact_id

    def work_folder(self, step: str, artifact_id: str) -> Path:
        return self.work / f"{step}-{artifact_id[:8]}"

    def tracking_folder(self, tracker: str, job: Job) -> Path:
        """Where a tracker may keep files of a step: no other step's, and nobody else writes there."""
        return self.folder / "tracking" / tracker / job.recipe / f"{job.step}-{job.artifact_id[:8]}"

    def find(self, artifact_id: str) -> Manifest | None:
        """The manifest of a finished artifact; None if it was not made, or is known to be damaged: see `damage`."""
        manifest, problems = self.look_at(artifact_id)
        return None if problems else manifest

    def damage(self, artifact_id: str) -> list[str]:
        """What is known to be wrong with an artifact that was made: sizes are looked at, and what was hashed before."""
        return self.look_at(artifact_id)[1]

    def look_at(self, artifact_id: str) -> tuple[Manifest | None, list[str]]:
        """The manifest of what was made under this id (None if nothing was, or it cannot be read), and what is wrong."""
        folder = self.artifact_folder(artifact_id)
        if not self.has_manifest(artifact_id):
            return None, []
        try:
            manifest = read_manifest(folder)
            return manifest, self.damage_of(artifact_id, manifest)
        except ArtifactError as error:
            return None, [str(error)]
        except OSError as error:
            return None, [f"cannot be read: {error}"]

    def has_manifest(self, artifact_id: str) -> bool:
        """Whether something was made under this id, sound or not."""
        return is_there(self.artifact_folder(artifact_id) / MANIFEST)

    def damage_of(self, artifact_id: str, manifest: Manifest) -> list[str]:
        if manifest.artifact_id != artifact_id:
            return [f"{MANIFEST} is that of {manifest.artifact_id[:12]}"]
        return [f"{name} {what}" for name, what in known_damage(self.artifact_folder(artifact_id), manifest).items()]

    def all_ids(self) -> list[str]:
        return sorted(path.name for path in entries_of(self.artifacts) if is_there(path / MANIFEST))

    def artifacts_at(self, places: Iterable[str]) -> set[str]:
        """The names of those folders that are artifacts of this store, whatever they hold by now."""
        homes = {self.artifacts, self.artifacts.resolve()}
        return {Path(place).name for place in places if Path(place).parent in homes}

    def resolve(self, name: str) -> tuple[str, Path]:
        """(artifact id, folder) that an id, its first digits, a folder, or a step's name means.

        A step's name, or `recipe/step`, means the artifact it made in the plan that its recipe ran last.
        """
        if holds_file(Path(name), MANIFEST):
            return read_manifest(Path(name)).artifact_id, Path(name)
        meanings = self.meanings(name)
        if not meanings:
            raise ArtifactError(
                Problem(
                    name,
                    f"no artifact or step of this name in {self.folder}",
                    "`slipway status` lists them; --store names another store.",
                )
            )
        if len(meanings) > 1:
            listed = ", ".join(f"{each[:12]} ({what})" for each, what in sorted(meanings.items()))
            raise ArtifactError(
                Problem(name, f"means several artifacts: {listed}", "Write the first digits of the one that you mean.")
            )
        (artifact_id,) = meanings
        if not self.has_manifest(artifact_id):
            raise ArtifactError(
                Problem(name, "has not been made yet", "Run its recipe; `slipway status` tells how far it is.")
            )
        return artifact_id, self.artifact_folder(artifact_id)

    def meanings(self, name: str) -> dict[str, str]:
        """Artifact id -> what is of this name: the step of a recipe, or an artifact whose id begins so."""
        found: dict[str, str] = {}
        steps_known: set[tuple[str, str]] = set()
        for plan in self.records().plans:
            for step, recorded in plan.steps.items():
                if name in (step, f"{plan.name}/{step}") and (plan.path, step) not in steps_known:
                    steps_known.add((plan.path, step))
                    found.setdefault(recorded.artifact_id, f"{step} of {plan.path}")
        for artifact_id in self.all_ids() if len(name) >= 4 else ():
            if artifact_id.startswith(name):
                found.setdefault(artifact_id, "an id")
        return found

    # Running a step

    def begin(self, job: Job) -> None:
        """Makes the work folder and writes the job into it. Raises `StoreError` if a process is running the step."""
        with writing(job.work_folder):
            make_folder(job.work_folder)
            with job.files.locked():
                job.files.begin()
                job.write()

    def checkpoints(
        self, step: str, artifact_id: str, keep: int = 2, environment: Mapping[str, str] | None = None
    ) -> Checkpoints:
        return Checkpoints(WorkFolder(self.work_folder(step, artifact_id)).checkpoints, keep, environment or {})

    def running(self, work: Path) -> Running | None:
        """Who runs the step of this work folder, or None. Takes no lock: no start fails because somebody asked."""
        return WorkFolder(work).running()

    def commit(
        self,
        job: Job,
        metrics: Mapping[str, float],
        facts: Facts,
        *,
        wall_seconds: float,
        device: str,
        world_size: int,
        environment: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Turns the work folder's `out/` into the artifact: hash, flush, manifest last, one rename.

        Raises `DataError` if a metric is not one finite number.
        """
        require_finite(metrics, job.step)
        out = job.files.out
        files = list_files(out)
        commit, dirty = git_state()
        manifest = Manifest(
            artifact_id=job.artifact_id,
            artifact_kind=job.output_kind,
            stage=job.kind,
            stage_version=job.stage_version,
            step=job.step,
            recipe=job.recipe,
            seed=job.seed,
            params=job.params,
            input_ids=job.input_ids,
            source_digests=job.source_digests,
            files=files,
            facts=facts,
            metrics=dict(metrics),
            git_commit=commit,
            git_dirty=dirty,
            library_versions=library_versions(),
            environment=dict(environment or {}),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_seconds=round(wall_seconds, 3),
            device=device,
            world_size=world_size,
        )
        with writing(self.artifacts):
            let_others_read(out)
            sync_below(out)
            write_text(out / MANIFEST, sealed(manifest))
            make_folder(self.artifacts)
            target = self.artifact_folder(job.artifact_id)
            if target.exists():
                self.discard(target)
            out.rename(target)
            sync(self.artifacts)
        return manifest

    def discard(self, folder: Path) -> None:
        """Removes a folder of the store such that a crash leaves it whole or gone, never half."""
        trash = self.folder / "trash" / f"{folder.name}-{os.getpid()}-{time.time_ns()}"
        with writing(folder):
            trash.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(trash)
            remove(trash)
        with contextlib.suppress(OSError):
            trash.parent.rmdir()

    # Recipes that ran here

    def record(self, recipe: str, entry: Mapping[str, Any], *, running: bool = False) -> list[str]:
        """Remembers the plan that a recipe runs: what changed since, and what `gc` must keep, is told from it.

        `running` says that this process runs it, until `end`. Returns what the user should know of other records.
        """
        with writing(self.recipes):
            return record_plan(self.recipes, recipe, entry, running=running)

    def end(self, recipe: str, entry: Mapping[str, Any]) -> None:
        """Notes that this process no longer runs the plan."""
        # Where that cannot be written, the process counts as ended once it has.
        with contextlib.suppress(OSError, StoreError):
            end_plan(self.recipes, recipe, entry)

    def records(self) -> Records:
        """The plans that ran here."""
        return read_records(self.recipes)

    def oddities(self) -> list[str]:
        """A sentence for each thing in the store that nobody can use: the rest goes on without it."""
        return self.odd_records() + self.odd_folders()

    def odd_records(self) -> list[str]:
        return [f"{odd}." for odd in self.records().odd]

    def odd_folders(self) -> list[str]:
        notes = []
        for folder, what in ((self.artifacts, "artifact"), (self.work, "work folder")):
            notes += [f"{path} is no {what}: it is passed over" for path in entries_of(folder) if not is_folder(path)]
        for path in filter(is_folder, entries_of(self.artifacts)):
            _, problems = self.look_at(path.name)
            notes += [f"artifact {path.name[:12]}: {problems[0]}"] if problems else []
        return notes


def usable(folder: Path) -> Path:
    """The absolute path of a store. Raises `StoreError` if no folder can be there."""
    try:
        # Also the working folder's name, where it is part of the path, must be text: it is written down.
        folder = expanded(expanded(folder).absolute())
        status(folder)
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        status(nearest)
    except PathError as error:
        said = "; ".join(str(problem.what if isinstance(problem, Problem) else problem) for problem in error.problems)
        raise StoreError(Problem(shown_path(str(folder)), f"cannot be a store: {said}", MOVE)) from None
    if not nearest.is_dir():
        raise StoreError(Problem(str(folder), f"cannot be a store: {nearest} is no folder", MOVE))
    return folder


def is_there(path: Path) -> bool:
    """Whether the path exists, as far as anybody can tell."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether the path is a folder that can be looked into."""
    return path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def entries_of(folder: Path) -> list[Path]:
    """What stands in the folder, sorted; nothing if there is none. Raises `StoreError` if it cannot be looked into."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(Problem(str(folder), f"cannot be read: {error.strerror}", CHANGE_RIGHTS)) from None
