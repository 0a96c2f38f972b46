"""One owner per step: whoever runs it holds it, from before anything changes in its work folder until all its processes have ended.

A second run of the same step waits, and finds it made. What the ranks themselves hold (`WorkFolder.locked`) begins when rank 0
comes to it, and ends with it: between two runs that start at the same moment it cannot decide.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from pipeline.running.interrupts import Interrupts
from pipeline.store.disk import writing
from pipeline.store.durable import make_folder
from pipeline.store.job import Job
from pipeline.store.locks import Taken

POLL_SECONDS = 0.2


@contextlib.contextmanager
def owned(job: Job, say: Callable[[str], None], interrupts: Interrupts, seconds: float | None = None) -> Iterator[bool]:
    """Holds the step; waits first while anybody else runs it, for so long at most. False where we are asked to stop meanwhile."""
    with writing(job.work_folder):
        make_folder(job.work_folder)
    deadline = None if seconds is None else time.monotonic() + seconds
    said = False
    with contextlib.ExitStack() as stack:
        while not is_taken(job, stack):
            if interrupts.asked:
                yield False
                return
            if deadline is not None and time.monotonic() > deadline:
                break  # Whoever begins now is told who has it.
            if not said:
                running = job.files.running()
                say(
                    f"  waits for {running.who if running else 'another run'}, which runs it; Ctrl-C ends only the waiting"
                )
                said = True
            time.sleep(POLL_SECONDS)
        yield True


def is_taken(job: Job, stack: contextlib.ExitStack) -> bool:
    """Whether the step is ours now, until the stack is left."""
    if job.files.running() is not None:
        return False
    try:
        with writing(job.work_folder):
            stack.enter_context(job.files.owner.held())
    except Taken:
        return False
    return True
