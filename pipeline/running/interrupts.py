"""What the command hears of signals: that what runs is to save and stop, or to end at once."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from pipeline.errors import EXIT_CRASH


@dataclass
class Interrupts(AbstractContextManager["Interrupts"]):
    """Hears SIGINT, SIGTERM and SIGUSR1: the first asks the running step to save and stop, a second one ends it.

    Those that `only_ask` never end anything, nor do they make a first one of the others a second: schedulers warn with SIGUSR1
    that the time is nearly up, and may send SIGTERM in the same moment.
    """

    only_ask: frozenset[int] = frozenset({signal.SIGUSR1})
    asked: bool = False
    exit_code: int = EXIT_CRASH
    """That of a command which ends because of the last signal, and nothing was saved: 128 + its number."""
    demands: int = 0
    """Signals that do more than ask."""
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.demands += number not in self.only_ask
        self.exit_code = 128 + number

    @property
    def insisted(self) -> bool:
        return self.demands > 1

    @property
    def how_to_insist(self) -> str:
        return "Ctrl-C twice" if signal.SIGTERM in self.only_ask else "once more"
