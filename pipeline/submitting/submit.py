"""Hands the steps of a plan to a scheduler, a job each, chained by what they read; finds them again, and cancels them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import Problem, StoreError
from pipeline.running.plan import Plan
from pipeline.running.unfinished import take_over
from pipeline.store.disk import writing
from pipeline.store.durable import make_folder, write_text
from pipeline.store.job import Job
from pipeline.store.locks import Lock, Taken
from pipeline.store.store import Store
from pipeline.submitting.chain import Link, links_of

Say = Callable[[str], None]


class Queued(Protocol):
    """A job that waits or runs. Prints itself."""

    @property
    def job_id(self) -> str: ...


class Scheduler(Protocol):
    """What `submit` needs of a cluster; `launch/clusters` has it."""

    def adapted(self, job: Job) -> Job:
        """The job with the launcher that it has there."""

    def script(self, job: Job, *, distributed: bool) -> str:
        """The text that runs the job, to be submitted as a file."""

    def queued(self) -> Mapping[str, Any]:
        """Work folder -> the job in it that waits or runs."""

    def submit(self, script: Path, after: Sequence[str]) -> str:
        """Submits the script behind the jobs of these ids; returns its own."""

    def let_go(self, queued: Any) -> bool:
        """Releases a job that the scheduler holds, and no person; whether it did."""

    def cancel(self, job_ids: Sequence[str]) -> None: ...


def submit(plan: Plan, store: Store, scheduler: Scheduler, say: Say, *, dry_run: bool = False) -> int:
    """Submits every step that has to run and neither waits nor runs; returns how many. With `dry_run` it shows their scripts.

    Everything that can be refused is, before the first job is submitted.
    """
    links = links_of(plan)
    jobs = {link.step.name: scheduler.adapted(link.step.job(plan.recipe.name, store)) for link in links}
    scripts = {
        link.step.name: scheduler.script(jobs[link.step.name], distributed=link.step.recipe_step.stage.distributed)
        for link in links
    }
    if dry_run:
        for link in links:
            behind = f"  # after {', '.join(link.after)}" if link.after else ""
            say(f"==> {jobs[link.step.name].files.batch_script} <=={behind}\n{scripts[link.step.name]}")
        return 0
    with alone(store):
        known = scheduler.queued()
        require_ours(links, known)
        for sentence in store.record(plan.recipe.name, plan.record(store)):
            say(f"note: {sentence}")
        return submit_links(links, jobs, scripts, known, store, scheduler, say)


def submit_links(
    links: Sequence[Link],
    jobs: Mapping[str, Job],
    scripts: Mapping[str, str],
    known: Mapping[str, Queued],
    store: Store,
    scheduler: Scheduler,
    say: Say,
) -> int:
    """Submits what is not `known` to wait or run, each behind the jobs of what it reads."""
    ids: dict[str, str] = {}
    submitted = 0
    width = max((len(link.step.name) for link in links), default=0)
    for link in links:
        job = jobs[link.step.name]
        if found := known.get(job.work):
            ids[link.step.name] = found.job_id
            what = "released  " if scheduler.let_go(found) else "kept      "
            say(f"{link.step.name:<{width}}  {what} {found}")
            continue
        take_over(link.step.adopts, link.step.work, store)
        store.begin(job)
        job.files.requeues.unlink(missing_ok=True)
        write_text(job.files.batch_script, scripts[link.step.name])
        after = [ids[name] for name in link.after]
        ids[link.step.name] = scheduler.submit(job.files.batch_script, after)
        submitted += 1
        behind = f", after {', '.join(f'{name} ({ids[name]})' for name in link.after)}" if link.after else ""
        say(f"{link.step.name:<{width}}  submitted  job {ids[link.step.name]}{behind}; {job.files.batch_script}")
    return submitted


def require_ours(links: Iterable[Link], known: Mapping[str, Queued]) -> None:
    """Raises `StoreError` for steps that are being run by what is no job of the scheduler: they cannot be waited for."""
    problems = [
        Problem(f"stages.{link.step.name}", link.step.reason.running, "Wait for it, or stop it; then submit again.")
        for link in links
        if link.step.reason.running and str(link.step.work) not in known
    ]
    if problems:
        raise StoreError(*problems)


@contextlib.contextmanager
def alone(store: Store) -> Iterator[None]:
    """Holds the store against another submission, which would not see the jobs of this one yet."""
    with writing(store.recipes):
        make_folder(store.recipes)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Lock(store.recipes / "submitting").held())
        except Taken as taken:
            hint = f"Try again when it has ended. {taken}".rstrip()
            raise StoreError(Problem(str(store.folder), "another `slipway submit` is at work here", hint)) from None
        yield


def cancel(works: Iterable[Path], scheduler: Scheduler) -> list[str]:
    """Cancels the jobs of these work folders; returns a line each."""
    known = scheduler.queued()
    found = {work.name: known[str(work)] for work in works if str(work) in known}
    if found:
        scheduler.cancel([queued.job_id for queued in found.values()])
    return [f"cancelled {name}: {queued}" for name, queued in found.items()]
