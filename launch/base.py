"""What a launcher is, and how a command is run and watched on this machine."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pipeline.errors import LaunchError, Problem
from pipeline.settings.strict import CHECKOUT
from pipeline.store.job import Job

WORKER = "pipeline.running.worker"
POLL_SECONDS = 0.1
Watch = Callable[[], bool]
"""Called several times a second while the processes run; True means: kill them now."""


class Launcher(Protocol):
    """Turns a job into processes."""

    def command(self, job: Job) -> list[str]:
        """The command that runs the job, which a person can paste into a shell. Pure.

        Raises `LaunchError` where the job's resources do not say enough.
        """

    def run(self, job: Job, watch: Watch) -> int:
        """Runs the job to its end and returns the exit code of its command."""


class LocalProcess:
    """Runs the command as a child of this process; the base of launchers that start their processes themselves."""

    def command(self, job: Job) -> list[str]:
        raise LaunchError(Problem(type(self).__name__, "says nothing of its command"))

    def run(self, job: Job, watch: Watch) -> int:
        return run_command(self.command(job), job.files.log, os.environ, watch)


def run_command(command: list[str], log: Path, environment: Mapping[str, str], watch: Watch) -> int:
    """Runs `command` from the checkout with its output appended to `log`, and returns its exit code.

    The command gets a session of its own, so that Ctrl-C reaches only us, and its end is asked for in an orderly way;
    it is told to end if we die. It finds the programs that were installed beside this Python (ninja among them), whether
    or not its environment is activated.
    """
    environment = {
        **environment,
        "PYTHONPATH": in_front(str(CHECKOUT), environment.get("PYTHONPATH")),
        "PATH": in_front(str(Path(sys.executable).parent), environment.get("PATH")),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        except OSError as error:
            hint = "Install the project's environment with `make environment`."
            raise LaunchError(Problem(command[0], f"cannot be started: {error.strerror}", hint)) from None
        while (code := process.poll()) is None:
            if watch():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return -signal.SIGKILL
            time.sleep(POLL_SECONDS)
        watch()
        return code


def in_front(folder: str, paths: str | None) -> str:
    """`paths`, a value like that of PATH, with `folder` searched first."""
    return os.pathsep.join(dict.fromkeys([folder, *filter(None, (paths or "").split(os.pathsep))]))


def end_with_parent() -> Callable[[], object] | None:
    """What a new process calls so that Linux sends it SIGTERM when its parent dies; elsewhere there is nothing to call."""
    if sys.platform != "linux":
        return None
    import ctypes

    PR_SET_PDEATHSIG = 1
    return functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def script(name: str) -> str:
    """The path of a command that was installed beside this Python, or its bare name."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else name
