"""What ties a rank to the launcher that started it, and lets others see that it goes on.

A rank must not outlive its launcher: it would wait for its group, and hold the step's lock, for as long as a collective
lasts. Linux ends it with its parent; a thread ends it when a launcher further up is gone (the deepspeed launcher starts a
second one, which starts the ranks). Launchers are known by their command line, which names the worker and the work folder:
so a shell or a script that started one in the background may end. Where the first launcher is on another machine, it is gone
when the connection is over which it reads what the ranks print.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path

from pipeline.processes import Process, descendants, end_all, end_with_parent, look_up
from pipeline.running.marks import Mark, own_mark, write_mark
from pipeline.store.work_folder import WorkFolder

WORKER = "pipeline.running.worker"
POLL_SECONDS = 0.5
STDOUT = 1
INNER_DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


def launchers_above(work: str, first: int) -> list[Process]:
    """The processes that started this rank to run `work`, nearest first, beginning with process `first`."""
    found = []
    process = look_up(first)
    while process is not None and is_launcher(process, work):
        found.append(process)
        process = look_up(process.parent)
    return found


def is_launcher(process: Process, work: str) -> bool:
    """Whether the process is a Python program that was told to start the worker on this work folder."""
    arguments = process.command_line()
    return WORKER in arguments and work in arguments and process.runs_python()


def ranks_below(first: int, work: str) -> dict[int, Process]:
    """Rank -> process, of the ranks of `work` that process `first` or what it started has started on this machine.

    Before it has left a mark, a rank is known by its command line, and its number by what its launcher set.
    """
    return {rank_of(process): process for process in descendants(first) if is_rank(process, work)}


def is_rank(process: Process, work: str) -> bool:
    """Whether the process is a Python that runs the worker itself on this work folder."""
    arguments = process.command_line()
    run = list(dropwhile(lambda each: each.startswith("-") and each != "-m", arguments[1:]))
    return run[:2] == ["-m", WORKER] and run[-1] == work and process.runs_python()


def rank_of(process: Process) -> int:
    """The number that torchrun or deepspeed gave it; 0 where it stands alone."""
    numbers = [each.removeprefix("RANK=") for each in process.environment() if each.startswith("RANK=")]
    return int(numbers[0]) if numbers and numbers[0].isdecimal() else 0


def is_abandoned(
    launchers: Sequence[Process], parent: Process | None, environment: Mapping[str, str], arguments: Sequence[str]
) -> bool:
    """Whether a launcher that must have started this rank is gone already, before it could be watched.

    torchrun and the inner deepspeed launcher show in what they hand to a rank. The inner one itself was started by the
    outer one, except on other machines, where it is told its `--node_rank`.
    """
    started_by_launcher = "TORCHELASTIC_RUN_ID" in environment or any(a.startswith("--local_rank") for a in arguments)
    if not launchers:
        return started_by_launcher and (parent is None or not parent.runs_python())
    return INNER_DEEPSPEED_LAUNCHER in launchers[-1].command_line() and not is_started_from_elsewhere(launchers)


def is_started_from_elsewhere(launchers: Sequence[Process]) -> bool:
    """Whether an outer deepspeed launcher on another machine started these, through ssh."""
    outermost = launchers[-1].command_line() if launchers else []
    return INNER_DEEPSPEED_LAUNCHER in outermost and any(each.startswith("--node_rank") for each in outermost)


def has_lost_its_reader(descriptor: int) -> bool:
    """Whether nobody can read any more what is written there: the other end of a pipe or connection is closed."""
    watched = select.poll()
    watched.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


@dataclass
class Lifeline:
    """Runs beside a rank: ends it with its launcher, writes its mark, and calls `every_poll` twice a second."""

    work: Path
    rank: int
    every_poll: Callable[[], None] = lambda: None
    boundaries: int = 0
    """How many boundaries the rank has come to; whoever asks whether to stop counts one."""
    signs: int = 0
    """How many signs of life it gave between them."""
    mark: Mark = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.mark = own_mark(self.rank)

    def start(self, arguments: Sequence[str]) -> None:
        """Ties this process to its launchers. `arguments` are those of the worker, its work folder the last."""
        parent = os.getppid()
        launchers = launchers_above(arguments[-1], parent)
        if launchers:
            end_with_parent(parent)
        if is_abandoned(launchers, look_up(parent), os.environ, arguments):
            end_itself()
        WorkFolder(self.work).marks.mkdir(exist_ok=True)
        write_mark(self.work, self.mark)
        threading.Thread(target=self.watch, args=(launchers,), name="lifeline", daemon=True).start()

    def watch(self, launchers: Sequence[Process]) -> None:
        from_elsewhere = is_started_from_elsewhere(launchers)
        while all(launcher.lives() for launcher in launchers) and not (from_elsewhere and has_lost_its_reader(STDOUT)):
            self.show()
            self.every_poll()
            time.sleep(POLL_SECONDS)
        end_itself()

    def boundary(self) -> None:
        """The rank came to a boundary."""
        self.boundaries += 1

    def sign(self) -> None:
        """The rank goes on with something that the others do not do."""
        self.signs += 1

    def commit(self) -> None:
        """The rank's result is whole. Putting it into the store is not to be interrupted, however long that takes."""
        self.every_poll = lambda: None
        with self.lock:
            self.mark = replace(self.now(), is_committing=True)
            write_mark(self.work, self.mark)

    def show(self) -> None:
        """Writes the mark if there is news."""
        with self.lock:
            if self.mark.ended is None and self.mark != self.now():
                self.mark = self.now()
                write_mark(self.work, self.mark)

    def end(self, status: str) -> None:
        """Says how the rank ended; the first word counts."""
        with self.lock:
            if self.mark.ended is None:
                self.mark = replace(self.now(), ended=status)
                write_mark(self.work, self.mark)

    def now(self) -> Mark:
        """The mark with what has been counted."""
        return replace(self.mark, boundaries=self.boundaries, signs=self.signs)


def end_itself() -> None:
    """Ends this process and what it started, at once: nobody is left to tell."""
    end_all(lambda: descendants(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)


INTERRUPTION_SECONDS = 3.0


@dataclass
class StopAtOnce:
    """Called beside a stage without state: interrupts it once its work folder holds a request to stop.

    What does not look up from its work (C code) within `INTERRUPTION_SECONDS` is ended: there is nothing to save.
    """

    files: WorkFolder
    say_stopped: Callable[[int], None]
    """Says that the rank was stopped by the signal of this number."""
    since: float | None = None

    def __call__(self) -> None:
        if self.since is None:
            if self.files.stop_is_requested():
                self.since = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self.since > INTERRUPTION_SECONDS:
            self.say_stopped(signal.SIGTERM)
            end_all(lambda: descendants(os.getpid()))
            os._exit(128 + signal.SIGTERM)
