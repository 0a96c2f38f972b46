"""MLflow: a tracking server, or what else its client can write to. What it has is asked for, and never written twice."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pipeline.store.artifact import Manifest
from trackers.base import Begun, Options, Run, Tracker, as_text, flat, metrics_of, status_of, unreachable

LONGEST_PARAM = 500
"""Characters of a param's value that every store of MLflow takes."""
MOST_AT_ONCE = 500
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
ENDED = {"finished": "FINISHED", "preempted": "SCHEDULED", "interrupted": "KILLED", "failed": "FAILED"}


class MLflowOptions(Options):
    """`tracking: {mlflow: {uri: "http://host:5000"}}`."""

    uri: str | None = None
    """Where to: the address of a tracking server, `databricks`, or `sqlite:///FILE` where all of mlflow is installed. MLFLOW_TRACKING_URI where it is not given."""
    experiment: str | None = Field(default=None, min_length=1)
    """The experiment; MLFLOW_EXPERIMENT_NAME where it is not given, the recipe's name where neither is."""


class MLflow(Tracker):
    """One run per step; all steps of a recipe in one experiment."""

    name: ClassVar[str] = "mlflow"
    library: ClassVar[str] = "mlflow"
    options = MLflowOptions
    given: MLflowOptions

    def begin(self, run: Run) -> Begun:
        uri = self.given.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ValueError("is told no place: give `uri` in the recipe, or set MLFLOW_TRACKING_URI")
        if uri.startswith(("http://", "https://")) and (reason := unreachable(uri)):
            raise ConnectionError(reason)
        if uri.startswith(("file:", "/")):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.last: dict[str, int] = {}
        self.sentences: list[str] = []
        self.id = self.known(run.id) or self.new(run)
        return Begun(self.id)

    def known(self, own_id: str | None) -> str | None:
        """The id of the run that was begun before, if the server still has it."""
        from mlflow.exceptions import MlflowException

        try:
            if own_id is None or self.client.get_run(own_id).info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        self.client.update_run(own_id, status="RUNNING")
        return own_id

    def new(self, run: Run) -> str:
        """Makes a run with its params; returns its id."""
        name = self.given.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.group
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        tags = {"recipe": run.job.recipe, "stage": run.job.kind, "artifact_id": run.job.artifact_id}
        made: str = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in flat(run.config()).items():
            self.client.log_param(made, name_for(key), as_text(value)[:LONGEST_PARAM])
        return made

    def numbers(self, step: int, values: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        new = {name_for(key): value for key, value in values.items()}
        metrics = [Metric(key, value, int(time * 1000), step) for key, value in new.items() if self.is_new(key, step)]
        for start in range(0, len(metrics), MOST_AT_ONCE):
            self.client.log_batch(self.id, metrics=metrics[start : start + MOST_AT_ONCE])
        self.last |= {metric.key: step for metric in metrics}

    def is_new(self, key: str, step: int) -> bool:
        """Whether the server has nothing of this metric at this step or after it."""
        if key not in self.last:
            self.last[key] = max((each.step for each in self.client.get_metric_history(self.id, key)), default=-1)
        return step > self.last[key]

    def progress(self, what: str, done: float, total: float, time: float) -> None:
        self.numbers(int(done), {f"progress/{what}": done / total if total else 0.0}, time)

    def sentence(self, step: int, text: str, time: float) -> None:
        self.sentences.append(text)
        self.client.set_tag(self.id, "mlflow.note.content", "\n\n".join(self.sentences)[-5000:])

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]], time: float) -> None:
        self.client.log_text(self.id, as_text(list(rows), indent=2), f"{name}/{step}.json")

    def flush(self) -> None:
        """Each call is a request of its own."""

    def made(self, manifest: Manifest, folder: Path) -> None:
        self.numbers(0, metrics_of(manifest), time.time())
        self.client.set_tag(self.id, "artifact", str(folder))
        self.client.set_tag(self.id, "inputs", as_text(manifest.input_ids))

    def end(self, exit_code: int | None) -> None:
        self.client.set_terminated(self.id, status=ENDED[status_of(exit_code)])


def name_for(key: str) -> str:
    """The key in the letters that MLflow takes."""
    return NOT_IN_NAMES.sub("_", key)[:250]
