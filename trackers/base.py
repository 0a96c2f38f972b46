"""What a tracker is, and what it is told of the step that it shows."""

from __future__ import annotations

import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pipeline.settings.strict import Strict
from pipeline.store.artifact import Manifest
from pipeline.store.job import Job
from pipeline.store.numbers import json_text

SECRET = re.compile(r"(^|[_.-])(token|key|secret|password|passwd|credentials?)$", re.IGNORECASE)
"""Names of what is not shown: in a recipe they are mostly no secrets, and nobody misses them on a tracker."""
HIDDEN = "(hidden)"


class Options(Strict):
    """What a recipe tells a tracker; each has its own."""


class StartAgain(Exception):
    """The tracker must begin in a new process, with these variables in its environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__("must begin in a new process")
        self.environment = dict(environment)


@dataclass(frozen=True)
class Run:
    """The step that a tracker shows, as one run of the group that the recipe is."""

    job: Job
    folder: Path
    """Where the tracker may keep files: it is the step's alone, and the tracker's."""
    id: str | None = None
    """What the tracker called this run when it was begun before."""
    sent_step: int = -1
    """The last training step that a server is known to have."""
    told_step: int = -1
    """The last training step of which the tracker was told, whether or not that was sent."""
    kept_in: str = ""
    """Where it kept then what it did not send."""

    @property
    def group(self) -> str:
        return self.job.recipe

    @property
    def name(self) -> str:
        return self.job.step

    def config(self) -> dict[str, Any]:
        """What decided the result, and where it runs; what looks like a secret is left out."""
        job = self.job
        return {
            "recipe": job.recipe,
            "step": job.step,
            "stage": job.kind,
            "artifact_id": job.artifact_id,
            "seed": job.seed,
            "inputs": dict(job.input_ids),
            "params": without_secrets(job.params),
            "resources": without_secrets(job.resources.model_dump(mode="json", exclude={"tracking"})),
        }


@dataclass(frozen=True)
class Begun:
    """What a tracker says when it has begun to show a run."""

    id: str
    """What it calls the run: it gets it back when the step goes on."""
    after_step: int = -1
    """It has everything up to this training step, and cannot forget it. -1: it wants to hear all from the beginning."""
    sends: bool = False
    """Whether it tells a server of the run."""
    kept_in: str = ""
    """Where it keeps what it does not send."""
    note: str = ""
    """A sentence for the user."""


class Tracker(ABC):
    """Shows one run. It lives in a process of its own, where it may take its time, fail and hang.

    `numbers` come in the order of their steps. A method that raises ends the tracker, never the training.
    """

    name: ClassVar[str] = ""
    """What a recipe calls it."""
    options: ClassVar[type[Options]] = Options
    """The fields of its mapping below `tracking:`."""
    library: ClassVar[str] = ""
    """The module that it needs, of the extra `trackers`."""

    def __init__(self, options: Options) -> None:
        self.given = options

    @classmethod
    def asked_by(cls, environment: Mapping[str, str]) -> bool | None:
        """Whether the user's environment switches it on or off, whatever the recipe says; None where it says nothing."""
        return None

    @classmethod
    def missing(cls) -> str:
        """What is not installed that it needs, and how to get it; empty where all is there."""
        if not cls.library or find_spec(cls.library):
            return ""
        return f"{cls.library} is not installed: pip install -c constraints.txt -e '.[trackers]'"

    @abstractmethod
    def begin(self, run: Run) -> Begun:
        """Begins to show the run, or goes on with it."""

    @abstractmethod
    def numbers(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Numbers of a training step, at `time` in seconds since the epoch."""

    @abstractmethod
    def progress(self, what: str, done: float, total: float, time: float) -> None:
        """How far something has come that is no training step, such as rows read."""

    @abstractmethod
    def sentence(self, step: int, text: str, time: float) -> None:
        """A sentence that the step said."""

    @abstractmethod
    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]], time: float) -> None:
        """Rows with the same keys, such as completions and what they are worth."""

    @abstractmethod
    def flush(self) -> None:
        """Lets others see what was said so far."""

    @abstractmethod
    def made(self, manifest: Manifest, folder: Path) -> None:
        """The step has made its artifact, in this folder."""

    @abstractmethod
    def end(self, exit_code: int | None) -> None:
        """The step has ended with this exit code; None where its process was ended, or goes on under another tracker."""


def unreachable(url: str, seconds: float = 5.0) -> str:
    """Why nothing answers at the host and port of `url`; empty if something does."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        return f"{parts.hostname}:{port}: {error.strerror or error}"
    return ""


def without_secrets(value: Any, name: str = "") -> Any:
    """The value, with what has a secret's name hidden, at any depth."""
    if SECRET.search(name) and isinstance(value, str | int | float):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each, name) for each in value]
    return value


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`: mappings that are not empty are walked into."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}/{key}" if above else str(key)
        found |= flat(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found


def as_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON, a text as it is."""
    return value if isinstance(value, str) else json_text(value, "what a tracker is told", indent=indent)


def status_of(exit_code: int | None) -> str:
    """How a step ended, in a word."""
    return {0: "finished", 75: "preempted", None: "interrupted"}.get(exit_code, "failed")


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """The figures of an artifact, flat."""
    return {f"made/{name}": float(value) for name, value in flat(manifest.metrics).items() if is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
