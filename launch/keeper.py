"""Stands between `slipway run` and a command, and leaves nothing of the command behind.

`python launch/keeper.py COMMAND...` runs the command and exits with its code (128 + the signal's number if one ended it).
All that the command started, in whatever session, is ended with SIGKILL once the command has ended, or once our standard
input is closed: `slipway run` holds its other end, and Linux closes that however `slipway run` dies. When the keeper
itself is killed, so is the command; `slipway run` ends what that leaves.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
from types import FrameType

from pipeline.processes import adopt_orphans, descendants, end_all, end_with_parent, reap

POLL_SECONDS = 0.05
EXIT_NO_COMMAND = 127


def main(command: list[str]) -> int:
    """Runs the command to its end, or to that of whoever started us; returns the exit code."""
    adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A scheduler signals every process at once. The command decides; a handler, unlike SIG_IGN, is not inherited.
        signal.signal(number, pass_over)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=functools.partial(end_with_parent, os.getpid())
        )
    except OSError as error:
        print(f"{command[0]}: cannot be started: {error.strerror}", file=sys.stderr)
        return EXIT_NO_COMMAND
    while process.poll() is None and not input_is_closed(POLL_SECONDS):
        pass
    end_all(lambda: descendants(os.getpid()))
    code = process.wait()
    reap()
    return code if code >= 0 else 128 - code


def pass_over(number: int, frame: FrameType | None) -> None:
    """Receives a signal and does nothing."""


def input_is_closed(wait_seconds: float) -> bool:
    """Whether the other end of our standard input is closed, having waited for it so long at most."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], wait_seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
