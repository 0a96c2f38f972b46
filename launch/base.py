"""What a launcher is, and how a command is run and watched on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import LaunchError, Problem
from pipeline.processes import Process, carrying, descendants, end_all, exiting_since, look_up, wait_for
from pipeline.settings.strict import CHECKOUT, Reading, Strict, validate
from pipeline.store.job import Job

WORKER = "pipeline.running.worker"
KEEPER = Path(__file__).with_name("keeper.py")
MARK = "SLIPWAY_RUN"
"""The variable by which all processes of one command are known, whatever becomes of their parents."""
POLL_SECONDS = 0.1
KEEPER_SECONDS = 15.0
"""How long the keeper has to end everything before we do."""
Watch = Callable[[], bool]
"""Called several times a second while the processes run; True means: kill them now."""
Options = TypeVar("Options", bound=Strict)


class NoOptions(Strict):
    """Of a launcher that needs to be told nothing."""


class Launcher(Protocol):
    """Turns a job into processes."""

    @property
    def name(self) -> str:
        """What a recipe calls it."""

    @property
    def options(self) -> type[Strict]:
        """The fields that a recipe may write beside `kind` in `launcher: {kind: ...}`."""

    def command(self, job: Job) -> list[str]:
        """The command that runs the job, which a person can paste into a shell. It creates nothing.

        Raises `LaunchError` where the job's resources do not say enough.
        """

    def run(self, job: Job, environment: Mapping[str, str], watch: Watch) -> int:
        """Runs the job to its end and returns the exit code of its command. Leaves no process of it behind."""


class LocalProcess:
    """Runs the command as a child of this process; the base of launchers that start their processes themselves."""

    name = ""
    options: type[Strict] = NoOptions

    def command(self, job: Job) -> list[str]:
        raise LaunchError(Problem(type(self).__name__, "says nothing of its command"))

    def run(self, job: Job, environment: Mapping[str, str], watch: Watch) -> int:
        return run_command(self.command(job), job.files.log, environment, watch)


def options_of(job: Job, name: str, model: type[Options]) -> Options:
    """What the recipe tells the launcher `name`; the defaults where the job names another one.

    Raises `LaunchError` where that no longer holds, such as a file that is gone.
    """
    given = job.resources.launcher_options if job.resources.launcher_name == name else {}
    options, problems = validate(model, given, launcher_field(job), Reading([job.work_folder]))
    if options is None:
        raise LaunchError(*problems)
    return options


def launcher_field(job: Job) -> str:
    """Where the options of the launcher stand in the recipe."""
    return f"stages.{job.step}.resources.launcher"


def run_command(command: list[str], log: Path, environment: Mapping[str, str], watch: Watch) -> int:
    """Runs `command` from the checkout with its output appended to `log`, and returns its exit code.

    The command gets a session of its own, so that Ctrl-C reaches only us, and a keeper, so that nothing of it is left
    when this function returns or this process is killed. It finds the programs that were installed beside this Python
    (ninja among them), whether or not its environment is activated.
    """
    mark = secrets.token_hex(16)
    environment = {
        **environment,
        "PYTHONPATH": in_front(str(CHECKOUT), environment.get("PYTHONPATH")),
        "PATH": in_front(str(Path(sys.executable).parent), environment.get("PATH")),
        "PYTHONUNBUFFERED": "1",
        MARK: mark,
    }
    if shutil.which(command[0], path=environment["PATH"]) is None:
        hint = "Install the project's environment with `make environment`."
        raise LaunchError(Problem(command[0], "cannot be started: there is no such program", hint))
    with log.open("ab") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-P", str(KEEPER), *command],
            cwd=CHECKOUT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        itself = look_up(keeper.pid)
        assert itself is not None, "it is our child, and we have not waited for it"
        killed = False
        try:
            while keeper.poll() is None and not (killed := watch()):
                time.sleep(POLL_SECONDS)
        finally:
            end(keeper, f"{MARK}={mark}", itself.started)
        watch()
        return -signal.SIGKILL if killed else keeper.returncode


def end(keeper: subprocess.Popen[bytes], mark: str, started: int) -> None:
    """Returns once the keeper, what it kept and all that carries the mark have ended. Raises `LaunchError` if one does not.

    Also once what has begun after the keeper, which `started` then, and is dying has let go of its locks.
    """
    assert keeper.stdin is not None
    keeper.stdin.close()
    try:
        keeper.wait(KEEPER_SECONDS)
    except subprocess.TimeoutExpired:

        def kept() -> list[Process]:
            itself = look_up(keeper.pid)
            return [*descendants(keeper.pid), *([itself] if itself and not itself.has_ended else [])]

        end_all(kept)
        keeper.wait()
    if left := end_all(lambda: carrying(mark)):
        numbers = ", ".join(str(process.pid) for process in left)
        hint = "They wait for a disk or a driver; see `ps`. The step's lock is free once they are gone."
        raise LaunchError(Problem("processes", f"{numbers} do not end", hint))
    wait_for(exiting_since(started))


def in_front(folder: str, paths: str | None) -> str:
    """`paths`, a value like that of PATH, with `folder` searched first."""
    return os.pathsep.join(dict.fromkeys([folder, *filter(None, (paths or "").split(os.pathsep))]))


def script(name: str) -> str:
    """The path of a command that was installed beside this Python, or its bare name."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else name
