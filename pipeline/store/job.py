"""A job: everything one step's processes need to know, as a JSON file that a person can read and rerun by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ArtifactError, Problem
from pipeline.settings.resources import Resources
from pipeline.settings.strict import Strict
from pipeline.store.artifact import Kind
from pipeline.store.durable import read_json, write_text
from pipeline.store.work_folder import WorkFolder


class Job(Strict):
    """`job.json` in the work folder of a step."""

    recipe: str
    step: str
    kind: str
    """The stage's kind."""
    stage_version: int
    artifact_id: str
    artifact_kind: str
    params: dict[str, Any]
    """All params, defaults included; outside files as absolute paths."""
    inputs: dict[str, str]
    """Role -> folder, or `hub:<repository>@<revision>`."""
    input_ids: dict[str, str]
    source_digests: dict[str, str]
    """Param that names outside files -> digest of their content."""
    seed: int
    resources: Resources
    store: str
    """Absolute path of the store."""
    work: str
    """Absolute path of the folder that this file stands in."""

    @property
    def work_folder(self) -> Path:
        return Path(self.work)

    @property
    def files(self) -> WorkFolder:
        """The work folder with the names of its files, and what is done with them."""
        return WorkFolder(self.work_folder)

    @property
    def output_kind(self) -> Kind:
        return Kind(self.artifact_kind)

    def write(self) -> Path:
        write_text(self.files.job_file, self.model_dump_json(indent=2) + "\n")
        return self.files.job_file


def read_job(folder: Path) -> Job:
    """The job of a work folder. Raises `ArtifactError` if there is none or it cannot be read."""
    path = WorkFolder(folder).job_file
    hint = "Write it with `slipway job RECIPE STAGE`."
    try:
        return Job.model_validate(read_json(path))
    except OSError as error:
        raise ArtifactError(Problem(str(path), f"cannot be read: {error.strerror or error}", hint)) from None
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(Problem(str(path), f"is not a job: {first}", hint)) from None
