"""Asks a process of its own, and reads the JSON on the last line of what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.settings.strict import CHECKOUT

Ask = Callable[[Sequence[str], float], "Answer"]


@dataclass(frozen=True)
class Answer:
    """How a probe ended: the JSON on its last line of output, or None and what went wrong."""

    value: dict[str, Any] | None
    error: str
    seconds: float


def ask(command: Sequence[str], timeout_seconds: float) -> Answer:
    """Runs a probe from the checkout and reads the JSON on the last line of its output."""
    environment = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, f"{command[0]} cannot be started: {error.strerror}", 0.0)
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        end_session(process)
        return Answer(None, f"no answer after {timeout_seconds:g} s", time.monotonic() - started)
    seconds = time.monotonic() - started
    try:
        value = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        value = None
    if process.returncode != 0 or not isinstance(value, dict):
        return Answer(None, last_error(errors) or f"ended with exit code {process.returncode}", seconds)
    return Answer(value, "", seconds)


def end_session(process: subprocess.Popen[str]) -> None:
    """Kills the process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def last_error(text: str) -> str:
    """The line that names the first exception in what a process wrote, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.partition("]: ")[2] or line for line in lines if "Error: " in line or "Exception: " in line]
    return (named or lines[-1:] or [""])[0][:300]
