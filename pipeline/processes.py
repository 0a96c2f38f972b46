"""What Linux tells of processes: whose child each is, whether it has ended or is stopped; and how many of them are ended.

Only the standard library, and no other module of ours: `launch/keeper.py` must start at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PF_EXITING = 0x4
"""Of the flags in `stat`: https://docs.kernel.org/filesystems/proc.html; the flag itself stands in linux/sched.h."""
ENDING_SECONDS = 10.0
"""How long `end_all` goes on: a process that waits for a disk or a driver ends when that answers."""
REAPING_SECONDS = 2.0


@dataclass(frozen=True)
class Process:
    """A process as it is now. `started`, in clock ticks since boot, tells it from a later one of the same number."""

    pid: int
    parent: int
    state: str
    started: int
    flags: int = 0
    threads: int = 1

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more; one that nobody has waited for yet has ended as well.

        While threads of it are still on their way out, so are its files and locks.
        """
        return self.state in "ZX" and self.threads <= 1

    @property
    def is_exiting(self) -> bool:
        """Whether it is on its way out: its memory, and with it the environment, may be gone while it still holds locks."""
        return not self.has_ended and (self.state in "ZX" or bool(self.flags & PF_EXITING))

    @property
    def is_stopped(self) -> bool:
        """Whether a signal such as SIGSTOP holds it."""
        return self.state == "T"

    def lives(self) -> bool:
        """Whether this very process still runs."""
        now = look_up(self.pid)
        return now is not None and now.started == self.started and not now.has_ended

    def identity(self) -> Identity:
        return Identity(self.pid, socket.gethostname(), this_machine(), self.started)

    def command_line(self) -> list[str]:
        """The arguments it was started with; empty where it is gone."""
        return read_list(self.pid, "cmdline")

    def environment(self) -> list[str]:
        """The `NAME=value`s it was started with; empty where it is gone or another user's."""
        return read_list(self.pid, "environ")

    def runs_python(self) -> bool:
        try:
            return Path(os.readlink(PROC / str(self.pid) / "exe")).name.startswith("python")
        except OSError:
            return False


def look_up(pid: int) -> Process | None:
    """The process of this number, or None."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name stands in brackets and may hold anything, brackets and spaces too.
    fields = text.rpartition(")")[2].split()
    return Process(
        pid,
        parent=int(fields[1]),
        state=fields[0],
        started=int(fields[19]),
        flags=int(fields[6]),
        threads=int(fields[17]),
    )


@dataclass(frozen=True)
class Identity:
    """Which process something was, for whoever reads of it later or elsewhere: another of its number is not taken for it."""

    pid: int
    host: str
    """For people; whether the process can be looked for is told from `machine`."""
    machine: str
    """The running kernel and its name space of process numbers: only there does `pid` mean something."""
    started: int
    """In clock ticks since boot."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_here(self) -> bool:
        """Whether this process can look for it."""
        return self.machine == this_machine()

    def process(self) -> Process | None:
        """The process, if it is here and has not ended."""
        process = look_up(self.pid) if self.is_here() else None
        return process if process and process.started == self.started and not process.has_ended else None

    def is_dead(self) -> bool:
        """Whether it is known to have ended: False if nobody here can tell."""
        if not self.is_here():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        # Another user's process may be hidden from us, and lives.
        return look_up(self.pid) is not None and self.process() is None


def this_machine() -> str:
    """What is the same for two processes exactly if each can look for the other by its number."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def identity_of(pid: int) -> Identity:
    """That of a process of this machine. Raises `ProcessLookupError` where there is none of this number."""
    process = look_up(pid)
    if process is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return process.identity()


def this_process() -> Identity:
    return identity_of(os.getpid())


def read_list(pid: int, name: str) -> list[str]:
    try:
        data = (PROC / str(pid) / name).read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in data.split(b"\0") if part]


def all_processes() -> Iterator[Process]:
    """Every process that has not ended."""
    for name in os.listdir(PROC):
        if name.isdigit() and (process := look_up(int(name))) and not process.has_ended:
            yield process


def descendants(pid: int) -> list[Process]:
    """The children of a process, their children and so on, in whatever session they are."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def carrying(mark: str) -> list[Process]:
    """The other processes that were started with `mark`, a `NAME=value`, in their environment."""
    return [process for process in all_processes() if process.pid != os.getpid() and mark in process.environment()]


def end_all(find: Callable[[], list[Process]]) -> list[Process]:
    """Sends SIGKILL, which a stopped process cannot escape either, to all that `find` finds until it finds none.

    Returns those that are left after `ENDING_SECONDS`.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while (found := find()) and time.monotonic() < deadline:
        for process in found:
            if process.lives():
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return found


def exiting_since(started: int) -> list[Process]:
    """The processes, whosever they are, that began at `started` or later and are on their way out.

    What dies loses its environment before its locks, so that `carrying` does not see it any more.
    """
    return [process for process in all_processes() if process.is_exiting and process.started >= started]


def wait_for(processes: Sequence[Process]) -> None:
    """Waits, for `ENDING_SECONDS` at most, until all of them have ended."""
    deadline = time.monotonic() + ENDING_SECONDS
    while any(process.lives() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def memory_bytes_of(process: Process) -> int:
    """What the process takes of memory and swap, its share of what it has in common with others; 0 where it is gone."""
    try:
        lines = (PROC / str(process.pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss:", "SwapPss:")))


def reap() -> None:
    """Waits for the orphans that were ended, or they would stay in the process table of a container without an init."""
    deadline = time.monotonic() + REAPING_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)


def adopt_orphans() -> None:
    """Makes this process, instead of that of number 1, the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent(parent: int) -> None:
    """Has Linux send this process SIGKILL as soon as `parent`, its parent, ends; at once if it ended before."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
