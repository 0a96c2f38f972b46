"""The folder of a step that runs or was interrupted: what its files are called, and what is done with them.

work/<step>-<first 8 of id>/
    job.json                    what to run
    log.txt  journal.jsonl      what it printed, and said of its progress
    checkpoints/  out/          its state, and the artifact being built
    rendezvous/                 where its processes find each other
    lock  lock-<n>  running.json  who runs it: rank 0
    lock-of-owner               the same of what starts the ranks
    start.json  spent.json      the checkpoint that all its processes resume from; the seconds of earlier runs
    ranks/<rank>.json           what each rank says of itself
    stop-requested              somebody wishes it to save and stop
    outcome.json                how it ended
    batch.sh  console-<n>.log   the script that a scheduler was given, and what its job n printed
    requeues                    a line each time that job was queued again after a crash, or with nothing saved
    tracking-<tracker>.json     what a tracker calls the step's run, and how far it was told
    system.jsonl                what the step did to its machine, where a tracker shows it
    *.log                       what libraries said to a stage
    (anything else)             the stage's own scratch files

No other module knows these names: `launch/`, the worker, `execute` and the reports ask here.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, StoreError
from pipeline.processes import Identity, Process, this_process, wait_for
from pipeline.store.disk import writing
from pipeline.store.durable import TEMPORARY, make_folder, read_json, write_json
from pipeline.store.locks import Lock, Taken

JOB = "job.json"
OURS = frozenset(
    f"{JOB} log.txt journal.jsonl checkpoints out rendezvous running.json start.json spent.json ranks stop-requested outcome.json batch.sh requeues system.jsonl".split()
)
"""Names of what is not the stage's own. Those of locks begin with `lock`, what is remembered of trackers with `TRACKING`."""
TRACKING = "tracking-"


class InUseError(StoreError):
    """Another process runs the step."""


@dataclass(frozen=True)
class Running:
    """Who runs a step."""

    process: Identity | None
    """None while it is just starting, and has not said so."""
    since: float
    log: str

    @property
    def who(self) -> str:
        return str(self.process or "a process that is just starting")

    def dying(self) -> list[Process]:
        """Its process, if it is one of this machine that dies and has not let go of the step yet."""
        process = self.process.process() if self.process else None
        return [process] if process is not None and process.is_exiting else []


@dataclass(frozen=True)
class WorkFolder:
    """The work folder at `path`; whether there is one is another question."""

    path: Path

    @property
    def job_file(self) -> Path:
        return self.path / JOB

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def meeting(self, place: str) -> Path:
        """Where the processes of the step meet at `place`."""
        return self.path / "rendezvous" / place

    @property
    def marks(self) -> Path:
        """What each rank says of itself."""
        return self.path / "ranks"

    def mark(self, rank: int) -> Path:
        return self.marks / f"{rank}.json"

    # What a scheduler is given and says

    @property
    def batch_script(self) -> Path:
        return self.path / "batch.sh"

    @property
    def requeues(self) -> Path:
        return self.path / "requeues"

    def console(self, job_id: str) -> Path:
        """What the scheduler's job of this id prints."""
        return self.path / f"console-{job_id}.log"

    def consoles(self) -> list[Path]:
        """What the scheduler's jobs of this step have printed, the newest last."""
        found = self.path.glob(self.console("*").name)
        return sorted(found, key=lambda path: (len(path.name), path.name))

    # What trackers are told

    @property
    def system_journal(self) -> Path:
        return self.path / "system.jsonl"

    def tracking_file(self, tracker: str) -> Path:
        return self.path / f"{TRACKING}{tracker}.json"

    # Who runs it

    @contextlib.contextmanager
    def locked(self, kind: str = "") -> Iterator[None]:
        """Holds the step's lock (see `Lock`) while it runs. Raises `InUseError` if another process holds it."""
        self.running()  # One that is dying lets go first.
        with contextlib.ExitStack() as stack:
            try:
                with writing(self.path):
                    stack.enter_context(self.lock(kind).held())
            except Taken as taken:
                raise self.in_use(str(taken)) from None
            with writing(self.path):
                running = Running(this_process(), time.time(), str(self.log))
                write_json(self.running_file, asdict(running), survives_power_loss=False)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    self.running_file.unlink(missing_ok=True)

    def running(self) -> Running | None:
        """Who runs the step, or None. Asking takes no lock and hinders nobody. One that is just dying is waited for."""
        if not self.lock().is_held():
            return None
        found = self.said_to_run()
        if dying := found.dying():
            wait_for(dying)
            return self.said_to_run() if self.lock().is_held() else None
        return found

    def said_to_run(self) -> Running:
        try:
            said = read_json(self.running_file)
            return Running(Identity(**said["process"]), float(said["since"]), str(said["log"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Running(None, time.time(), str(self.log))

    @property
    def running_file(self) -> Path:
        return self.path / "running.json"

    def lock(self, kind: str = "") -> Lock:
        return Lock(self.path / "lock", kind)

    @property
    def owner(self) -> Lock:
        """Held by whoever runs the step, from before anything changes here until all its processes have ended."""
        return Lock(self.path / "lock-of-owner")

    def in_use(self, remedy: str) -> InUseError:
        running = self.running()
        who = f" by {running.who}" if running else ""
        hint = f"Wait for it, or stop it; `slipway status` shows its log. {remedy}".rstrip()
        return InUseError(Problem(str(self.path), f"is being run{who}", hint))

    # The wish to stop

    def request_stop(self) -> None:
        """Asks the step to save and stop at its next boundary."""
        with writing(self.path):
            self.stop_file.touch()

    def stop_is_requested(self) -> bool:
        return self.stop_file.exists()

    @property
    def stop_file(self) -> Path:
        return self.path / "stop-requested"

    # Its beginning and its end

    def begin(self) -> None:
        """Makes the folder if need be, and forgets how an earlier run ended."""
        remove(self.marks)
        make_folder(self.marks)
        for file in (self.outcome_file, self.start_file, self.stop_file):
            file.unlink(missing_ok=True)

    def clear_output(self) -> None:
        """Leaves an empty `out/`."""
        remove(self.out)
        make_folder(self.out)

    def drop_output(self) -> int:
        """Removes what a run that failed has written to `out/`; returns the bytes that it took."""
        return drop(self.out)

    def drop_scratch(self) -> int:
        """Removes the stage's own scratch files; returns the bytes that they took."""
        return sum(drop(path) for path in sorted(self.path.iterdir()) if not is_ours(path.name))

    def write_start(self, resume: int | None, extends: Path | None = None) -> None:
        """Tells all processes of this run which checkpoint to resume from, None for none, and which one of another to extend."""
        content = {"resume": resume, "extends": str(extends) if extends else None}
        write_json(self.start_file, content, survives_power_loss=False)

    @property
    def start_file(self) -> Path:
        return self.path / "start.json"

    @property
    def is_prepared(self) -> bool:
        """Whether this run has come as far as its stage."""
        return self.start_file.exists()

    def read_start(self) -> tuple[int | None, Path | None]:
        content = read_json(self.start_file)
        return content["resume"], Path(content["extends"]) if content["extends"] else None

    @property
    def outcome_file(self) -> Path:
        return self.path / "outcome.json"

    def outcome(self) -> dict[str, Any]:
        """How the worker says the job ended; empty if it could not say."""
        try:
            value = read_json(self.outcome_file)
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def report(self, rank: int, status: str, **fields: Any) -> None:
        """Writes how the job ended. The first rank to say so is heard, but what is done and in the store outranks all.

        On a disk that is full it may not succeed: whoever reads has the exit code as well.
        """
        if status != "done" and self.outcome():
            return
        with contextlib.suppress(OSError):
            value = {"status": status, "rank": rank, **fields}
            write_json(self.outcome_file, value, survives_power_loss=False)

    @property
    def spent_seconds(self) -> float:
        """What earlier, interrupted runs of this step took."""
        try:
            return float(read_json(self.path / "spent.json")["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    @contextlib.contextmanager
    def time_kept(self) -> Iterator[None]:
        """Adds the seconds of a run that is interrupted to those spent, so that the manifest counts them all."""
        started = time.monotonic()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                write_json(self.path / "spent.json", {"seconds": self.spent_seconds + time.monotonic() - started})
            raise

    def finish(self, *, keep_checkpoints: bool = False) -> None:
        """Removes the checkpoints (unless asked) and scratch files of a step whose artifact is committed; log and journal stay."""
        kept = {
            JOB,
            *([self.checkpoints.name] if keep_checkpoints else []),
            self.log.name,
            self.journal.name,
            self.system_journal.name,
            self.outcome_file.name,
            self.running_file.name,
            self.marks.name,
            self.batch_script.name,
            *(path.name for path in self.consoles()),
        }
        for path in self.path.iterdir():
            if path.name not in kept and not path.name.startswith(("lock", TRACKING)):
                remove(path)


def is_ours(name: str) -> bool:
    """Whether what is called so in a work folder is not the stage's own: also a file of ours that is just being written."""
    ours = name.rsplit(".", 2)[0] if name.endswith(TEMPORARY) else name
    return ours in OURS or name.startswith(("lock", TRACKING)) or name.endswith(".log")


def drop(path: Path) -> int:
    """Removes a file, link or folder, if there is one; returns the bytes that its files took."""
    if path.is_dir() and not path.is_symlink():
        taken = sum(each.lstat().st_size for each in path.rglob("*") if not each.is_dir())
    else:
        taken = path.lstat().st_size if path.is_file() else 0
    remove(path)
    return taken


def remove(path: Path) -> None:
    """Removes a file, link or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
