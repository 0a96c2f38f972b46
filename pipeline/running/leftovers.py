"""What a step leaves behind that ends with a mistake: a word on what it had written, and nothing else that is of no use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pipeline.errors import LaunchError, SlipwayError, StoreError
from pipeline.figures import size
from pipeline.stage import World
from pipeline.store.disk import refusal
from pipeline.store.job import Job
from pipeline.store.work_folder import InUseError
from pipeline.store.works import read_work

TRIED_AGAIN = frozenset(each.__name__ for each in (StoreError, InUseError, LaunchError))
"""Errors that lie neither in the recipe nor in what it reads: once they are mended, the same step is run again."""


@contextlib.contextmanager
def failed_output_removed(job: Job, world: World) -> Iterator[None]:
    """Leaves no half or refused model behind: where the step ends with a user's error, what it had written is removed, unless
    asked.

    Turns what the disk refused, in whatever words a library says so, into a `StoreError`.
    """
    try:
        yield
    except Exception as error:
        refused = error if isinstance(error, SlipwayError) else refusal(error, job.work_folder)
        if refused is None:
            raise
        # The other ranks may still read and write scratch files: of a group, those are left to `slipway run`.
        name = type(refused).__name__ if world.size == 1 else None
        said = failed_output(job, name) if world.is_main else None
        raise type(refused)(*refused.problems, *filter(None, [said])) from error


REMOVED = "What it had written ("


def failed_output(job: Job, error: str | None) -> str | None:
    """What became of what a step had written that ended with an error of this name; None if it had written nothing."""
    if job.resources.keep_failed_output:
        return f"What it had written lies in {job.files.out} until the step runs again."
    if taken := drop_failed(job, error):
        return removed(job, taken)
    return None


def removed(job: Job, taken: int) -> str:
    how = f"`--set stages.{job.step}.resources.keep_failed_output=true` keeps it"
    return f"{REMOVED}{size(taken)}) was removed; {how}."


def rest_removed(job: Job, error: str | None, said: Sequence[str]) -> list[str]:
    """What is to be said besides: of what is left once all ranks have ended, and is removed now.

    Rank 0 leaves a group's scratch files, and everything where another rank was the first to fail.
    """
    if job.resources.keep_failed_output or not (taken := drop_failed(job, error)):
        return []
    if any(line.startswith(REMOVED) for line in said):
        return [f"So were its scratch files ({size(taken)})."]
    return [removed(job, taken)]


def drop_failed(job: Job, error: str | None) -> int:
    """Removes `out/`, and where `error` is the name of a mistake and no later run can use them the stage's scratch files;
    returns the bytes that they took.

    With other params a step has another work folder. One that is tried again as it is goes on from its scratch files, and
    so does one that resumes: a checkpoint may count on them. What an earlier run has left stays too where this one did not come
    as far as its stage.
    """
    taken = 0
    with contextlib.suppress(OSError):
        taken += job.files.drop_output()
        is_final = error is not None and error not in TRIED_AGAIN and job.files.is_prepared
        if is_final and not read_work(job.work_folder).can_resume():
            taken += job.files.drop_scratch()
    return taken
