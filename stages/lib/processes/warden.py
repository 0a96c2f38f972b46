"""Runs a command within limits, and leaves nothing of it behind: `python warden.py TERMS`, TERMS a JSON object.

The command's output goes to the file descriptor `output`; it may write to `results` as well. Once it has ended, has become
more than `most_processes`, takes more than `memory_bytes` with all that it started, or our standard input is closed (by
whoever started us, or by Linux when that ends), all of it is ended with SIGKILL, in whatever session it is. Then its `folder` is
removed, and one line tells how: `{"code": 0, "beyond": null}`, `beyond` being `memory` or `processes` where that was why.

Only the standard library, and `pipeline/processes.py`: it is started often.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import contextlib
import functools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from pipeline.processes import (
    adopt_orphans,
    descendants,
    end_all,
    end_with_parent,
    memory_bytes_of,
    reap,
)

WAIT_SECONDS = 0.01
LOOK_SECONDS = 0.05
"""Between two looks at what the processes take: each reads a file of every process of the machine."""


def keep_within(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the command to its end, or to that of its limits; says how it ended."""
    adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stay)
    process = subprocess.Popen(
        terms["command"],
        stdin=subprocess.DEVNULL,
        stdout=terms["output"],
        stderr=terms["output"],
        pass_fds=[terms["results"]],
        cwd=terms["folder"],
        start_new_session=True,
        preexec_fn=functools.partial(limit, os.getpid(), terms["memory_bytes"]),
    )
    os.close(terms["output"])
    os.close(terms["results"])
    beyond = watch(process, terms["memory_bytes"], terms["most_processes"])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    end_all(lambda: descendants(os.getpid()))
    code = process.wait()
    reap()
    shutil.rmtree(terms["folder"], ignore_errors=True)  # whoever started us may be gone
    return {"code": code, "beyond": beyond}


def stay(number: int, frame: FrameType | None) -> None:
    """Receives a signal and does nothing: whoever started us decides."""


def limit(warden: int, memory_bytes: int) -> None:
    """Called in the new process: it ends with the warden, dumps no core, and is refused more memory, or a larger file."""
    end_with_parent(warden)
    for what, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def watch(process: subprocess.Popen[bytes], memory_bytes: int, most_processes: int) -> str | None:
    """Returns once it is time to end what runs: which limit it went beyond, or None."""
    looked_at = 0.0
    while process.poll() is None:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], WAIT_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return None
        if time.monotonic() - looked_at < LOOK_SECONDS:
            continue
        looked_at = time.monotonic()
        running = descendants(os.getpid())
        if len(running) > most_processes:
            return "processes"
        if sum(map(memory_bytes_of, running)) > memory_bytes:
            return "memory"
    return None


if __name__ == "__main__":
    print(json.dumps(keep_within(json.loads(sys.argv[1])), allow_nan=False), flush=True)
