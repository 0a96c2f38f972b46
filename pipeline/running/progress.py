"""What a person sees while a plan is made and run: lines in a file, a progress line and tables on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from pipeline.figures import number, printable, real, seconds
from pipeline.store.numbers import is_plain


class Progress:
    """Follows a step's journal: one line that is rewritten on a terminal, a line per event elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.has_line = False
        self.started = time.monotonic()

    def event(self, step_name: str, event: Mapping[str, Any]) -> None:
        """Shows what a journal says, whatever stands in it."""
        kind = event.get("event")
        if kind == "note":
            self.line(f"  {words(event.get('text'))}")
        elif kind == "step":
            text = describe_step(event)
            self.rewrite(f"  {bar(event)} {text}") if self.live else self.line(f"  {text}")
        elif kind == "rollout":
            self.line(f"  {describe_rollout(event)}")
        elif kind == "heldout":
            names = [name for name, value in event.items() if is_plain(value) and name not in ("time", "step")]
            values = ", ".join(f"{name} {number(event[name])}" for name in names[:4])
            self.line(f"  held-out at step {plain(event.get('step', 0))}: {values}")
        elif kind == "progress":
            text = f"  {words(event.get('what', step_name))}: {number(event.get('done'))}"
            text += f" of {number(event['total'])}" if event.get("total") else ""
            self.rewrite(text) if self.live else self.line(text)

    def rewrite(self, text: str) -> None:
        self.stream.write(f"\r\x1b[2K{printable(text, self.stream)}")
        self.stream.flush()
        self.has_line = True

    def line(self, text: str) -> None:
        if self.has_line:
            self.stream.write("\r\x1b[2K")
            self.has_line = False
        self.stream.write(printable(text, self.stream) + "\n")
        self.stream.flush()


def words(value: Any) -> str:
    return value if isinstance(value, str) else number(value)


def plain(value: Any) -> str:
    """A number that counts steps, without commas."""
    return number(value).replace(",", "")


def describe_step(event: Mapping[str, Any]) -> str:
    step, total = real(event.get("step")), real(event.get("total_steps"))
    parts = [f"step {plain(event.get('step'))}" + (f"/{total:.0f}" if total else "")]
    for name, label in (("loss", "loss"), ("learning_rate", "lr"), ("gradient_norm", "gradient norm")):
        if (value := real(event.get(name))) is not None:
            parts.append(f"{label} {value:.4g}")
    parts += odd_numbers(event)
    if speed := real(event.get("tokens_per_second")):
        parts.append(f"{speed:,.0f} tokens/s")
    if step is not None and total and (each := real(event.get("seconds_per_step"))):
        parts.append(f"{seconds((total - step) * each)} left")
    return "  ".join(parts)


def describe_rollout(event: Mapping[str, Any]) -> str:
    parts = [f"rollout {plain(event.get('rollout'))}/{plain(event.get('total_rollouts'))}"]
    for name, label in (
        ("reward", "reward"),
        ("kl", "kl"),
        ("entropy", "entropy"),
        ("clipped", "clipped"),
        ("length_tokens", "length"),
        ("ended", "ended"),
    ):
        if (value := real(event.get(name))) is not None:
            parts.append(f"{label} {value:.4g}")
    return "  ".join(parts + odd_numbers(event))


def odd_numbers(event: Mapping[str, Any]) -> list[str]:
    """The numbers of an event that were not finite, as its journal names them."""
    odd = event.get("not_finite")
    return [f"{name} {words(value)}" for name, value in odd.items()] if isinstance(odd, Mapping) else []


def bar(event: Mapping[str, Any], width: int = 20) -> str:
    step = real(event.get("step")) or 0.0
    total = real(event.get("total_steps")) or step
    filled = round(width * min(max(step / total, 0.0), 1.0)) if total else 0
    return f"[{'#' * filled}{'.' * (width - filled)}]"
