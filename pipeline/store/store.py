"""Where things live. The only module that writes below the store, apart from the stage's own work folder.

runs/
  artifacts/<artifact id>/        immutable; manifest.json was written last, the folder appeared by one rename
  work/<step>-<first 8 of id>/    of a step that runs or was interrupted:
      job.json                    what to run
      log.txt  journal.jsonl      what it printed, and said of its progress
      checkpoints/  out/          its state, and the artifact being built
      lock  running.json          who runs it
      outcome.json                how it ended
  recipes/<name>.json             the plan each recipe last ran: step -> artifact and its identity
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, Problem, StoreError
from pipeline.settings.strict import CHECKOUT
from pipeline.store.artifact import MANIFEST, Facts, Manifest, differences, list_files, read_manifest, write_json
from pipeline.store.checkpoints import Checkpoints, sync
from pipeline.store.job import Job
from pipeline.store.numbers import require_finite

RECORDED_LIBRARIES = (
    "torch", "transformers", "deepspeed", "accelerate", "datasets", "datatrove", "tokenizers", "sentencepiece",
    "llmcompressor", "compressed-tensors", "safetensors", "numpy", "pydantic",
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    """Who runs a step."""

    pid: int
    host: str
    since: float
    log: str


class Store:
    """A folder of artifacts and of the work that makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.artifacts = self.folder / "artifacts"
        self.work = self.folder / "work"
        self.recipes = self.folder / "recipes"

    # Finding

    def artifact_folder(self, artifact_id: str) -> Path:
        return self.artifacts / artifact_id

    def work_folder(self, step: str, artifact_id: str) -> Path:
        return self.work / f"{step}-{artifact_id[:8]}"

    def find(self, artifact_id: str) -> Manifest | None:
        """The manifest of a finished artifact; None if it was not made, or a file of it is missing or cut short."""
        folder = self.artifact_folder(artifact_id)
        if not (folder / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(folder)
        except ArtifactError:
            return None
        return None if differences(folder, manifest.files, hashes=False) else manifest

    def damage(self, artifact_id: str) -> list[str]:
        """What a look at the sizes shows to be wrong with an artifact that was made; `verify` hashes as well."""
        folder = self.artifact_folder(artifact_id)
        if not (folder / MANIFEST).exists():
            return []
        try:
            return differences(folder, read_manifest(folder).files, hashes=False)
        except ArtifactError as error:
            return [str(error)]

    def all_ids(self) -> list[str]:
        if not self.artifacts.is_dir():
            return []
        return sorted(path.name for path in self.artifacts.iterdir() if (path / MANIFEST).exists())

    def resolve(self, name: str) -> tuple[str, Path]:
        """(artifact id, folder) that an id, its first digits, a folder, or a step's name means.

        A step's name, or `recipe/step`, means the artifact it made in the plan that ran last.
        """
        path = Path(name)
        if (path / MANIFEST).exists():
            return read_manifest(path).artifact_id, path
        matches = {artifact_id for artifact_id in self.all_ids() if len(name) >= 4 and artifact_id.startswith(name)}
        if not matches:
            for recipe, record in self.records().items():
                for step, entry in record["steps"].items():
                    if name in (step, f"{recipe}/{step}"):
                        matches.add(entry["artifact_id"])
        if len(matches) == 1:
            artifact_id = matches.pop()
            if self.find(artifact_id) is None and not (self.artifact_folder(artifact_id) / MANIFEST).exists():
                raise ArtifactError(
                    Problem(name, "has not been made yet", "Run its recipe; `slipway status` tells how far it is.")
                )
            return artifact_id, self.artifact_folder(artifact_id)
        if matches:
            listed = ", ".join(sorted(match[:12] for match in matches))
            raise ArtifactError(
                Problem(name, f"means several artifacts: {listed}", "Write more digits, or recipe/step.")
            )
        raise ArtifactError(
            Problem(
                name,
                f"no artifact or step of this name in {self.folder}",
                "`slipway status` lists them; --store names another store.",
            )
        )

    # Running a step

    def begin(self, job: Job) -> None:
        """Makes the work folder and writes the job into it. Raises `StoreError` if a process is running the step."""
        try:
            job.work_folder.mkdir(parents=True, exist_ok=True)
            with self.locked(job.work_folder):
                for leftover in ("outcome.json", "stop-requested"):
                    (job.work_folder / leftover).unlink(missing_ok=True)
                job.write()
        except StoreError:
            raise
        except OSError as error:
            hint = "Make room, or choose another place with --store or SLIPWAY_STORE."
            raise StoreError(Problem(str(job.work_folder), f"cannot be written: {error.strerror}", hint)) from None

    def checkpoints(self, step: str, artifact_id: str, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.work_folder(step, artifact_id) / "checkpoints", keep)

    @contextlib.contextmanager
    def locked(self, work: Path) -> Iterator[None]:
        """Holds the step's lock while it runs. Raises `StoreError` if another process holds it."""
        with (work / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                running = self.running(work)
                who = f" by process {running.pid} on {running.host}" if running else ""
                hint = "Wait for it, or stop it; `slipway status` shows its log."
                raise StoreError(Problem(str(work), f"is being run{who}", hint)) from None
            started = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.time(),
                "log": str(work / "log.txt"),
            }
            write_json(work / "running.json", started)
            try:
                yield
            finally:
                (work / "running.json").unlink(missing_ok=True)

    def running(self, work: Path) -> Running | None:
        """Who runs the step of this work folder, or None."""
        try:
            with (work / "lock").open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    return Running(**json.loads((work / "running.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def commit(
        self, job: Job, metrics: Mapping[str, float], facts: Facts, *, wall_seconds: float, device: str, world_size: int
    ) -> Manifest:
        """Turns the work folder's `out/` into the artifact: hash, fsync, manifest last, one rename.

        Raises `DataError` if a metric is not one finite number.
        """
        require_finite(metrics, job.step)
        out = job.work_folder / "out"
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
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_seconds=round(wall_seconds, 3),
            device=device,
            world_size=world_size,
        )
        for name in files:
            sync(out / name)
        (out / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sync(out / MANIFEST)
        for directory, _, _ in os.walk(out):
            sync(Path(directory))
        self.artifacts.mkdir(parents=True, exist_ok=True)
        target = self.artifact_folder(job.artifact_id)
        if target.exists():
            self.discard(target)
        out.rename(target)
        sync(self.artifacts)
        return manifest

    def finish(self, job: Job) -> None:
        """Removes the checkpoints and scratch files of a step whose artifact is committed; its log and journal stay."""
        kept = {"job.json", "log.txt", "journal.jsonl", "lock", "outcome.json", "running.json"}
        for path in job.work_folder.iterdir():
            if path.name not in kept:
                remove(path)

    def discard(self, folder: Path) -> None:
        """Removes a folder of the store such that a crash leaves it whole or gone, never half."""
        trash = self.folder / "trash" / f"{folder.name}-{os.getpid()}-{time.time_ns()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(trash)
        remove(trash)
        with contextlib.suppress(OSError):
            trash.parent.rmdir()

    # Recipes that ran here

    def record(self, recipe: str, entry: Mapping[str, Any]) -> None:
        """Remembers the plan that a recipe ran: what changed since, and what `gc` must keep, is told from it."""
        self.recipes.mkdir(parents=True, exist_ok=True)
        write_json(self.recipes / f"{recipe}.json", entry)

    def records(self) -> dict[str, dict[str, Any]]:
        """Recipe name -> `{"path", "overrides", "steps": {step: {"artifact_id", "identity"}}}`."""
        found = {}
        for path in sorted(self.recipes.glob("*.json")) if self.recipes.is_dir() else []:
            with contextlib.suppress(OSError, ValueError):
                found[path.stem] = json.loads(path.read_bytes())
        return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout; (None, None) where there is no git."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status.strip())


def library_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
