"""Work folders by what they work on. That is told from the whole id in job.json: a folder's name holds only its first digits,
and the name that the step had when it began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.checkpoints import Checkpoints, Newest
from pipeline.store.durable import read_json
from pipeline.store.work_folder import WorkFolder


@dataclass(frozen=True)
class Work:
    """A work folder, with what its job.json says; of one that cannot be read, nothing."""

    folder: Path
    step: str = ""
    recipe: str = ""
    artifact_id: str | None = None
    input_ids: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    keeps_checkpoint: bool = False
    """Whether its last checkpoint is to stay when the artifact is made."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(WorkFolder(self.folder).checkpoints)

    def can_resume(self) -> bool:
        """Whether a look at the sizes shows a complete checkpoint."""
        return self.checkpoints.newest(hashes=False).path is not None


def read_work(folder: Path) -> Work:
    """The folder with as much of its job as can be read: one of another version still says what it needs."""
    try:
        job = read_json(WorkFolder(folder).job_file)
    except (OSError, ValueError):
        job = None
    if not isinstance(job, dict):
        return Work(folder)
    resources = job.get("resources")
    return Work(
        folder,
        step=text(job.get("step")) or "",
        recipe=text(job.get("recipe")) or "",
        artifact_id=text(job.get("artifact_id")),
        input_ids=texts(job.get("input_ids")),
        inputs=texts(job.get("inputs")),
        keeps_checkpoint=isinstance(resources, dict) and resources.get("keep_last_checkpoint") is True,
    )


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def texts(value: Any) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def work_folders(below: Path) -> list[Path]:
    """The folders of `store.work`, sorted; hidden ones are none of ours."""
    if not below.is_dir():
        return []
    return sorted(path for path in below.iterdir() if path.is_dir() and not path.name.startswith("."))


def works_on(folders: Sequence[Path], artifact_id: str) -> Iterator[Work]:
    """Those among the folders whose job makes the artifact, whatever its step was called."""
    for folder in folders:
        if folder.name.endswith(f"-{artifact_id[:8]}"):
            work = read_work(folder)
            if work.artifact_id == artifact_id:
                yield work


def last_checkpoint_of(artifact: Path, *, hashes: bool) -> Newest:
    """The last checkpoint of the training that made an artifact, which lies in a store; with none, why there is none.

    Without `hashes` only sizes are compared.
    """
    works = work_folders(artifact.parent.parent / "work")
    found = [
        work.checkpoints.newest(hashes=hashes) for work in works_on(works, artifact.name) if work.checkpoints.steps()
    ]
    return max(found, key=lambda newest: newest.step, default=Newest(None, 0, []))
