"""Programs of others, run in processes of their own: within limits of time, memory and number, and none of them left behind.

    this process -- stdin --> warden.py -- starts --> the program -- starts --> whatever it starts
         ^  ^                                            |   |
         |  +------------- answers, a JSON line each ----+   |
         +---------------- what it prints -------------------+

It contains mistakes: what hangs, forks, eats memory, prints or dies. It is no wall against malice: the program is of the same
user, and sees the files and the network that this process sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.processes import warden

OF_THE_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which the ranks of a job find each other; a program that sees them would take itself for one."""
ENDING_SECONDS = 20.0
"""How long the warden may take to end everything before it is ended itself."""
KEPT_BYTES = 16 << 10
"""Of what a program prints; the rest is counted."""
LONGEST_ANSWER_BYTES = 4 << 20
MOST_PROCESSES = 64
TICK_SECONDS = 1.0
"""A longer time between two looks is one in which we were suspended ourselves, and the program too: it does not count."""


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may take."""

    seconds: float
    """Of wall-clock time for each answer."""
    first_seconds: float
    """The same for the first answer, before which the program loads what it needs."""
    memory_bytes: int
    """Of memory and swap for all its processes together; of data for each of them; of each file that it writes."""


class Abandoned(Exception):
    """A program was ended because whoever waited for it is to stop."""


def going_on() -> bool:
    """What is asked while a program runs where nobody may be told to stop."""
    return False


@dataclass
class Ended:
    """How a program ended. All of its processes have."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    trouble: str | None = None
    """Why not all answers came: timeout, memory, processes, or died; None where they did."""
    how: str = ""
    """The same, as a sentence that begins with `it`."""
    printed: bytes = b""
    printed_bytes: int = 0


def run_contained(
    program: Path,
    request: Mapping[str, Any],
    num_answers: int,
    limits: ProgramLimits,
    environment: Mapping[str, str],
    asked_to_stop: Callable[[], bool] = going_on,
) -> Ended:
    """Runs `python PROGRAM REQUEST_FILE FD` until it has written `num_answers` JSON objects, a line each, to the descriptor FD.

    The program stands in an empty folder, which is removed; it removes the file of its request itself. `asked_to_stop` is called
    at least once a second, and with each answer. Raises `Abandoned`, once the program has ended, where it says so.
    """
    if asked_to_stop():
        raise Abandoned
    with tempfile.TemporaryDirectory(prefix="slipway-", ignore_cleanup_errors=True) as folder:
        asked = Path(folder) / "request.json"
        asked.write_text(json.dumps(request, allow_nan=False), encoding="utf-8")
        with started(program, asked, limits, environment) as (keeper, results, output):
            listener = Listener(keeper, results, output, num_answers, limits, asked_to_stop)
            listener.listen()
            verdict = listener.finish()
    return ended_by(listener, verdict, limits)


def surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a program is given: these, without what makes a process a rank; hashes of strings are fixed."""
    kept = {name: value for name, value in environment.items() if name not in OF_THE_JOB}
    return {name: value for name, value in kept.items() if not name.startswith("TORCHELASTIC_")} | {
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def started(
    program: Path, asked: Path, limits: ProgramLimits, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """The warden, and the descriptors to read answers and prints from. However this ends, so does all that was started."""
    results, results_end = os.pipe()
    output, output_end = os.pipe()
    terms = {
        "command": [sys.executable, "-s", "-P", str(program), str(asked), str(results_end)],
        "folder": str(asked.parent),
        "results": results_end,
        "output": output_end,
        "memory_bytes": limits.memory_bytes,
        "most_processes": MOST_PROCESSES,
    }
    keeper = None
    try:
        try:
            keeper = subprocess.Popen(
                [sys.executable, "-S", "-E", "-P", str(warden.__file__), json.dumps(terms, allow_nan=False)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[results_end, output_end],
                env=dict(environment),
                start_new_session=True,
            )
        finally:
            os.close(results_end)
            os.close(output_end)
        yield keeper, results, output
    finally:
        if keeper is not None:
            end_keeper(keeper)
        os.close(results)
        os.close(output)


def end_keeper(keeper: subprocess.Popen[bytes]) -> None:
    """Has the warden end everything, and waits for it."""
    assert keeper.stdin is not None and keeper.stdout is not None
    keeper.stdin.close()
    try:
        keeper.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()  # Linux ends the program with it
        keeper.wait()
    keeper.stdout.close()


@dataclass
class Listener:
    """Reads what a program answers and prints, up to its end or that of its time."""

    keeper: subprocess.Popen[bytes]
    results: int
    output: int
    num_answers: int
    limits: ProgramLimits
    asked_to_stop: Callable[[], bool]
    answers: list[dict[str, Any]] = field(default_factory=list)
    printed: bytes = b""
    printed_bytes: int = 0
    rest: bytearray = field(default_factory=bytearray)
    """The beginning of the next answer."""
    is_late: bool = False
    is_garbled: bool = False

    def listen(self) -> None:
        """Returns once all answers are here, or no more will come. Raises `Abandoned` where nobody waits for them any more."""
        assert self.keeper.stdout is not None
        spent, looked_at = 0.0, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for source in (self.results, self.output, self.keeper.stdout.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while len(self.answers) < self.num_answers:
                limit = self.limits.seconds if self.answers else self.limits.first_seconds
                ready = {key.fd for key, _ in selector.select(min(limit - spent, TICK_SECONDS))}
                now = time.monotonic()
                spent, looked_at = spent + min(now - looked_at, TICK_SECONDS), now
                if self.output in ready and not self.take_print():
                    selector.unregister(self.output)
                before = len(self.answers)
                if self.results in ready and not self.take_answers():
                    return
                if self.keeper.stdout.fileno() in ready:  # all of it has ended: what was answered before is there
                    while self.results in {key.fd for key, _ in selector.select(0)} and self.take_answers():
                        pass
                    return
                if self.asked_to_stop():
                    raise Abandoned
                if len(self.answers) > before:
                    spent = 0.0
                elif spent >= limit:
                    self.is_late = True
                    return

    def take_print(self) -> bool:
        """Reads a part of what is printed. False at its end."""
        data = os.read(self.output, 1 << 16)
        self.printed += data[: max(0, KEPT_BYTES - len(self.printed))]
        self.printed_bytes += len(data)
        return bool(data)

    def take_answers(self) -> bool:
        """Reads the answers that are there. False at their end, or where they are none."""
        data = os.read(self.results, 1 << 16)
        self.rest += data
        lines: list[bytearray] = []
        if b"\n" in data:
            *lines, self.rest = self.rest.split(b"\n")
        for line in lines[: self.num_answers - len(self.answers)]:
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError):
                answer = None
            if not isinstance(answer, dict):
                self.is_garbled = True
                return False
            self.answers.append(answer)
        self.is_garbled = self.is_garbled or len(self.rest) > LONGEST_ANSWER_BYTES
        return bool(data) and not self.is_garbled

    def finish(self) -> dict[str, Any]:
        """Has everything ended, reads what was printed to its end, and returns how it ended."""
        assert self.keeper.stdin is not None and self.keeper.stdout is not None
        self.keeper.stdin.close()
        deadline = time.monotonic() + ENDING_SECONDS
        told = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            selector.register(self.keeper.stdout, selectors.EVENT_READ)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(deadline - time.monotonic()):
                    if key.fd == self.output:
                        if not self.take_print():
                            selector.unregister(self.output)
                        continue
                    told += (data := os.read(key.fd, 1 << 16))
                    if not data:
                        selector.unregister(key.fileobj)
        try:
            return dict(json.loads(told))
        except ValueError:
            return {"code": None, "beyond": None}


def ended_by(listener: Listener, verdict: Mapping[str, Any], limits: ProgramLimits) -> Ended:
    """What became of the program."""
    ended = Ended(listener.answers, printed=listener.printed, printed_bytes=listener.printed_bytes)
    if len(listener.answers) == listener.num_answers:
        return ended
    code, seconds = verdict["code"], limits.seconds if listener.answers else limits.first_seconds
    if listener.is_late:
        ended.trouble, ended.how = "timeout", f"it took more than {seconds:g} s"
    elif listener.is_garbled:
        ended.trouble, ended.how = "died", "it wrote where only its answers belong"
    elif verdict["beyond"] == "memory":
        ended.trouble, ended.how = "memory", f"it took more than {limits.memory_bytes / (1 << 30):g} GiB of memory"
    elif verdict["beyond"] == "processes":
        ended.trouble, ended.how = "processes", f"it started more than {MOST_PROCESSES} processes"
    else:
        how = "was killed" if code is None else f"ended with code {code}" if code >= 0 else f"died of signal {-code}"
        ended.trouble, ended.how = "died", f"its process {how}"
    return ended
