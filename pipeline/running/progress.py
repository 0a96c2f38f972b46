"""What a person sees while a plan is made and run: lines in a file, a progress line and tables on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from pipeline.figures import number, seconds


class Progress:
    """Follows a step's journal: one line that is rewritten on a terminal, a line per event elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.has_line = False
        self.started = time.monotonic()

    def event(self, step_name: str, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "note":
            self.line(f"  {event['text']}")
        elif kind == "step":
            text = describe_step(event)
            self.rewrite(f"  {bar(event)} {text}") if self.live else self.line(f"  {text}")
        elif kind == "rollout":
            self.line(f"  {describe_rollout(event)}")
        elif kind == "heldout":
            numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k not in ("time", "step")}
            values = ", ".join(f"{name} {number(value)}" for name, value in list(numbers.items())[:4])
            self.line(f"  held-out at step {event.get('step', 0)}: {values}")
        elif kind == "progress":
            text = f"  {event.get('what', step_name)}: {number(event['done'])}"
            text += f" of {number(event['total'])}" if event.get("total") else ""
            self.rewrite(text) if self.live else self.line(text)

    def rewrite(self, text: str) -> None:
        self.stream.write(f"\r\x1b[2K{text}")
        self.stream.flush()
        self.has_line = True

    def line(self, text: str) -> None:
        if self.has_line:
            self.stream.write("\r\x1b[2K")
            self.has_line = False
        self.stream.write(text + "\n")
        self.stream.flush()


def describe_step(event: Mapping[str, Any]) -> str:
    total = event.get("total_steps")
    parts = [f"step {event['step']}" + (f"/{total}" if total else "")]
    for name, label in (("loss", "loss"), ("learning_rate", "lr"), ("gradient_norm", "gradient norm")):
        if isinstance(event.get(name), int | float):
            parts.append(f"{label} {event[name]:.4g}")
    if speed := event.get("tokens_per_second"):
        parts.append(f"{speed:,.0f} tokens/s")
    if total and event.get("seconds_per_step"):
        parts.append(f"{seconds((total - event['step']) * event['seconds_per_step'])} left")
    return "  ".join(parts)


def describe_rollout(event: Mapping[str, Any]) -> str:
    parts = [f"rollout {event['rollout']}/{event['total_rollouts']}"]
    for name, label in (
        ("reward", "reward"),
        ("kl", "kl"),
        ("entropy", "entropy"),
        ("clipped", "clipped"),
        ("length_tokens", "length"),
        ("ended", "ended"),
    ):
        if isinstance(event.get(name), int | float):
            parts.append(f"{label} {event[name]:.4g}")
    return "  ".join(parts)


def bar(event: Mapping[str, Any], width: int = 20) -> str:
    total = event.get("total_steps") or event["step"]
    filled = round(width * event["step"] / total) if total else 0
    return f"[{'#' * filled}{'.' * (width - filled)}]"
