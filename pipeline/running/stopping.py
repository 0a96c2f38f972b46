"""How a rank is told to stop, and asked whether it was."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from types import FrameType

from pipeline.running.lifeline import Lifeline
from pipeline.store.work_folder import WorkFolder

STOP_POLL_SECONDS = 0.5


class Stopped(BaseException):
    """A signal asked the job to stop while there was nothing to save. No `except Exception` on the way may swallow it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"received {signal.Signals(number).name} while there was nothing to save")


@dataclass
class StopSignals:
    """Turns signals into a flag that the stage asks for at its boundaries.

    While `at_once` holds there is nothing to save (before a stage with state runs, and in one without), and they end the
    job: the first of them, for the end itself must not be disturbed.
    """

    files: WorkFolder
    is_main: bool
    at_once: bool = True
    asked: bool = False
    number: int = signal.SIGTERM
    """The signal that asked; SIGTERM where the work folder did."""
    looked_at: float = field(default=0.0)

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        self.number = number if first else self.number
        if self.at_once and first:
            raise Stopped(number)

    def __call__(self, alone: bool = False) -> bool:
        """True once this rank was signalled, or the work folder holds a request to stop (which rank 0 looks for, and one that is
        `alone`).

        Raises `Stopped` instead where there is nothing to save.
        """
        now = time.monotonic()
        if (self.is_main or alone) and not self.asked and now - self.looked_at > STOP_POLL_SECONDS:
            self.looked_at = now
            self.asked = self.files.stop_is_requested()
        if self.asked and self.at_once:
            raise Stopped(signal.SIGTERM)
        return self.asked


@dataclass(frozen=True)
class Asking:
    """Whether to stop, as a stage asks it; that it asks says how far it is."""

    stop: StopSignals
    lifeline: Lifeline

    def at_boundary(self) -> bool:
        self.lifeline.boundary()
        return self.stop()

    def within(self) -> bool:
        """Between two boundaries, in what this rank does by itself."""
        self.lifeline.sign()
        return self.stop(alone=True)
