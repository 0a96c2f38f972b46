"""The processes that show a step on trackers: rank 0 starts one for each, and lets it end.

What they do stands in `trackers/`, and they read what they show from the work folder. Nothing here waits for them while the
step runs: one that fails, hangs or cannot be started is no matter of the training's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.errors import EXIT_DONE
from pipeline.settings.strict import CHECKOUT
from pipeline.store.job import Job
from pipeline.store.journal import Journal

END_SECONDS = 32.0
"""How long trackers may take to show the end of a step that has made its artifact: two seconds more than they take by themselves."""
STOPPED_END_SECONDS = 8.0
"""The same where the step was stopped or has failed: somebody waits."""


class IsAsked(Protocol):
    """What is needed of a tracker here; `trackers/` has them."""

    @classmethod
    def asked_by(cls, environment: Mapping[str, str]) -> bool | None:
        """Whether the user's environment switches it on or off, whatever the recipe says; None where it says nothing."""


def asked(given: Mapping[str, Any], trackers: Mapping[str, IsAsked], environment: Mapping[str, str]) -> list[str]:
    """The trackers that the recipe or the environment asks for, and the environment does not switch off."""
    said = {name: tracker.asked_by(environment) for name, tracker in trackers.items()}
    return [name for name, switched in said.items() if (name in given if switched is None else switched)]


@dataclass
class Followers:
    """The processes that follow one step, each for one tracker."""

    trackers: Mapping[str, IsAsked]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, job: Job, step: int | None) -> None:
        """Starts them for a step that goes on from training step `step`, or begins. What cannot be started is said and left out."""
        names = asked(job.resources.tracking, self.trackers, os.environ)
        if not names:
            return
        Journal(job.files.system_journal, writes=True).rewind(-1 if step is None else step)
        for name in names:
            command = [sys.executable, "-m", "trackers", job.work, name, *(["--measure"] if name == names[0] else [])]
            try:
                self.processes.append(subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE))
            except OSError as error:
                Journal(job.files.journal, writes=True).note(f"tracker {name} cannot be started: {error}")

    def end(self, exit_code: int) -> None:
        """Tells them with which exit code the step ends, and gives them a little time to pass that on."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write(f"{exit_code}\n".encode())
                process.stdin.close()
        wait_for_all(self.processes, END_SECONDS if exit_code == EXIT_DONE else STOPPED_END_SECONDS)


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Returns once all have ended; those that have not after so many seconds are killed."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
