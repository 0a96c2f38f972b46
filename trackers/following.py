"""Follows one step for one tracker, in a process of its own: reads the journal, and tells the tracker what stands there.

The journal is the truth. When a step goes on, it is rewound to the checkpoint; the tracker says what it has that it cannot
take back (`Begun.after_step`), and is told the rest from the beginning. So it shows one curve, without a step twice or
missing, however often the step was killed. A tracker that fails is begun again every `RETRY_SECONDS`, and at the end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_CRASH, EXIT_DONE, StoreError
from pipeline.settings.strict import Reading, validate
from pipeline.store.durable import read_json, write_json
from pipeline.store.job import Job, read_job
from pipeline.store.journal import Journal, JournalTail
from pipeline.store.store import Store
from trackers.base import Run, StartAgain, Tracker, flat, is_number
from trackers.system import SystemFigures

POLL_SECONDS = 1.0
RETRY_SECONDS = 60.0
REMEMBER_SECONDS = 10.0
NICENESS = 10
END_SECONDS = 30.0
"""How long the tracker may take once the step has ended."""
KILLED_END_SECONDS = 5.0
"""The same where the step was killed: who killed it waits for its processes."""
EVENTS = {"step": "train", "rollout": "rollout", "heldout": "heldout", "system": "system"}
"""Event of the journal -> what its numbers are called, in front of their own names."""
REMEMBERED = ("id", "sent_step", "told_step", "kept_in")
"""Of a tracker, for when the step goes on: fields of `Run`."""
PLACES = frozenset({"event", "time", "step", "total_steps", "rollout", "total_rollouts", "not_finite"})
"""Fields that say where a number stands, and are none themselves."""


@dataclass
class Parent:
    """The rank whose journal is read. It says with which exit code it ends, or just ends."""

    pid: int = field(default_factory=os.getppid)
    exit_code: int | None = None
    heard: bytes = b""
    is_open: bool = True

    def has_ended(self, wait_seconds: float) -> bool:
        """Whether it has ended, or ends within the time."""
        if not self.is_open or os.getppid() != self.pid:
            return True
        if not select.select([sys.stdin.fileno()], [], [], wait_seconds)[0]:
            return os.getppid() != self.pid
        said = os.read(sys.stdin.fileno(), 64)
        self.heard += said
        if not said:
            self.is_open = False
            word = self.heard.split(b"\n")[0]
            self.exit_code = int(word) if word.lstrip(b"-").isdigit() else None
        return not self.is_open


@dataclass
class Follower:
    """Tells one tracker of one job."""

    job: Job
    name: str
    make: Callable[[], Tracker]
    parent: Parent
    measures: bool = False
    """Whether this follower measures what the system does, for itself and those beside it."""
    tracker: Tracker | None = None
    after_step: int = -1
    step: int = 0
    """The training step at which the journal stands."""
    sends: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    """What is remembered of the tracker: `REMEMBERED`."""
    remembered_at: float = 0.0
    has_said: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Follows the job to its end. Raises `StartAgain` where that needs another process."""
        while True:
            try:
                self.follow()
                return
            except StartAgain:
                raise
            except Exception as error:
                traceback.print_exc()
                self.tracker = None
                self.say(
                    f"tracker {self.name}: {next(iter(str(error).splitlines()), type(error).__name__)}. "
                    "It is tried again every minute, and told what it missed; the step does not wait for it"
                )
            if self.parent.has_ended(0):
                return
            self.parent.has_ended(RETRY_SECONDS)

    def follow(self) -> None:
        """Begins the tracker, and tells it all until the step has ended."""
        self.begin()
        figures = SystemFigures(self.job) if self.measures else None
        tails = [JournalTail(self.job.files.journal), JournalTail(self.job.files.system_journal)]
        while True:
            # What was written before the parent ended is read after that was seen.
            ended = self.parent.has_ended(POLL_SECONDS)
            if ended:
                end_soon(KILLED_END_SECONDS if self.parent.exit_code is None else END_SECONDS)
            if figures and not ended:
                figures.write_if_due(self.step)
            read = [tail.read() for tail in tails]
            if any(tail.was_rewound for tail in tails):
                self.begin()
                tails = [JournalTail(tail.path) for tail in tails]
                read = [tail.read() for tail in tails]
            for event in in_order(read, self.step):
                self.pass_on(event)
            self.showing.flush()
            self.remember(at_once=ended)
            if ended:
                self.end()
                return

    @property
    def showing(self) -> Tracker:
        assert self.tracker is not None, "it is begun before it is told anything"
        return self.tracker

    def begin(self) -> None:
        """Begins the tracker, or begins it again after the journal was rewound."""
        if self.tracker is not None:
            self.tracker.end(None)
        known = self.known()
        folder = Store(Path(self.job.store)).tracking_folder(self.name, self.job)
        run = Run(self.job, folder, **{name: known[name] for name in REMEMBERED if name in known})
        self.tracker = self.make()
        begun = self.tracker.begin(run)
        self.after_step, self.step = begun.after_step, 0
        self.sends = begun.sends
        self.state = dict(zip(REMEMBERED, (begun.id, begun.after_step, begun.after_step, begun.kept_in), strict=True))
        self.remember(at_once=True)
        if begun.note:
            self.say(f"tracker {self.name} {begun.note}")

    def known(self) -> dict[str, Any]:
        """What is remembered of the tracker."""
        with contextlib.suppress(OSError, ValueError):
            value = read_json(self.job.files.tracking_file(self.name))
            return value if isinstance(value, dict) else {}
        return {}

    def remember(self, *, at_once: bool) -> None:
        """Writes down how far the tracker has come."""
        if not at_once and time.monotonic() - self.remembered_at < REMEMBER_SECONDS:
            return
        self.remembered_at = time.monotonic()
        write_json(self.job.files.tracking_file(self.name), self.state, survives_power_loss=False)

    def pass_on(self, event: Mapping[str, Any]) -> None:
        """Tells the tracker of one event, unless it has it."""
        kind, at = str(event["event"]), moment(event)
        if kind == "note":
            if str(event.get("text", "")) not in self.has_said:
                self.showing.sentence(self.step, str(event.get("text", "")), at)
        elif kind == "progress" and is_number(event.get("done")) and is_number(event.get("total")):
            self.showing.progress(str(event.get("what", "rows")), event["done"], event["total"], at)
        elif kind in EVENTS and is_number(event.get("step")):
            self.step = max(self.step, int(event["step"]))
            if event["step"] > self.after_step:
                self.numbers(EVENTS[kind], event, at)
                self.state["told_step"] = self.step
                if self.sends:
                    self.state["sent_step"] = self.step

    def numbers(self, above: str, event: Mapping[str, Any], at: float) -> None:
        values = flat({name: value for name, value in event.items() if name not in PLACES})
        numbers = {
            f"{above}/{name.removeprefix(f'{above}_')}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float)
        }
        if numbers:
            self.showing.numbers(self.step, numbers, at)
        for name, value in values.items():
            if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
                self.showing.table(f"{above}/{name}", self.step, value, at)

    def say(self, sentence: str) -> None:
        """Says a sentence on the console, once."""
        if sentence not in self.has_said:
            self.has_said.add(sentence)
            with contextlib.suppress(OSError, StoreError):
                Journal(self.job.files.journal, writes=True).note(sentence)

    def end(self) -> None:
        """Tells the tracker how the step has ended, and what it has made."""
        store = Store(Path(self.job.store))
        if self.parent.exit_code == EXIT_DONE and (manifest := store.find(self.job.artifact_id)):
            self.showing.made(manifest, store.artifact_folder(self.job.artifact_id))
        self.showing.end(self.parent.exit_code)


def in_order(journals: Sequence[Sequence[Mapping[str, Any]]], step: int) -> list[Mapping[str, Any]]:
    """The new events of several journals by training step, and by time within one. `step`: at which the journals stand.

    Those of the system may be older than a restart after which the same steps came again.
    """
    placed = []
    for events in journals:
        at = step
        for event in events:
            at = max(at, int(event["step"])) if is_number(event.get("step")) else at
            placed.append((at, moment(event), event))
    return [event for _, _, event in sorted(placed, key=lambda each: each[:2])]


def moment(event: Mapping[str, Any]) -> float:
    """When the event happened, in seconds since the epoch."""
    at = event.get("time")
    return float(at) if isinstance(at, int | float) else 0.0


def end_soon(seconds: float) -> None:
    """Ends this process after the time, whatever it does then."""
    timer = threading.Timer(seconds, os._exit, [EXIT_CRASH])
    timer.daemon = True
    timer.start()


def main(work: str, name: str, measures: bool, trackers: Mapping[str, type[Tracker]]) -> None:
    """Follows the job in the work folder for one tracker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # It ends with its rank. A handler of our own, since what is ignored stays ignored in processes that it starts.
        signal.signal(number, lambda *_: None)
    os.nice(NICENESS)
    parent = Parent()
    job = read_job(Path(work))
    tracker = trackers[name]
    if missing := tracker.missing():
        Journal(job.files.journal, writes=True).note(f"tracker {name}: {missing}")
        return
    options, problems = validate(tracker.options, job.resources.tracking.get(name) or {}, f"tracking.{name}", Reading())
    if options is None:
        sys.exit("\n".join(map(str, problems)))
    try:
        Follower(job, name, lambda: tracker(options), parent, measures).run()
    except StartAgain as again:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **again.environment})
