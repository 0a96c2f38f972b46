"""What a person sees while a plan is made and run: lines in a file, a progress line and tables on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from pipeline.stage import Estimate


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """The rows as aligned columns of text, header first."""
    everything = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def number(value: float) -> str:
    """A number as people read it: thousands with commas, small ones with four digits."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def seconds(value: float) -> str:
    """A duration: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"


def size(value: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def arithmetic(estimate: Estimate, world_size: int) -> str:
    """Parameters, tokens, steps, batch, memory and disk of a step, as far as they are known, in one line."""
    parts = []
    if estimate.parameters:
        parts.append(f"{number(estimate.parameters)} parameters")
    if estimate.train_tokens:
        parts.append(f"{number(estimate.train_tokens)} tokens")
    if estimate.optimizer_steps:
        parts.append(f"{number(estimate.optimizer_steps)} steps")
    if estimate.global_batch_size and estimate.micro_batch_size and estimate.accumulation:
        factors = f"{estimate.micro_batch_size} x {estimate.accumulation} x {world_size}"
        parts.append(f"batch {estimate.global_batch_size} = {factors} (micro x accumulation x processes)")
    if estimate.memory_bytes_per_rank:
        parts.append(f"about {size(estimate.memory_bytes_per_rank)} memory per rank")
    if estimate.disk_bytes:
        parts.append(f"{size(estimate.disk_bytes)} on disk")
    return ", ".join(parts)


def headline(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The named metrics, as far as there are, in one line; the first few where none is named.

    A name that ends in a dot stands for all that begin with it: `heldout_perplexity.` for one number per model.
    """
    chosen = [
        metric
        for name in names
        for metric in metrics
        if metric == name or (name[-1] == "." and metric.startswith(name))
    ] or list(metrics)[:4]
    return ", ".join(f"{name.removeprefix('heldout_')} {number(metrics[name])}" for name in chosen)


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
