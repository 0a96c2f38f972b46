"""Walks a plan: hands each step's job to its launcher, shows its progress, stops at the first failure."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR, StoreError
from pipeline.figures import headline, real, seconds, table
from pipeline.running.branches import Branches, Start, can_begin, what_it_does
from pipeline.running.environment import environment_for
from pipeline.running.interrupts import Interrupts
from pipeline.running.leftovers import rest_removed
from pipeline.running.marks import names
from pipeline.running.owning import owned
from pipeline.running.plan import Action, Plan, Step
from pipeline.running.progress import Progress
from pipeline.running.supervision import Supervision
from pipeline.running.unfinished import take_over
from pipeline.stage import Stage
from pipeline.store.artifact import Manifest
from pipeline.store.disk import MAKE_ROOM, free_words, is_full
from pipeline.store.job import Job
from pipeline.store.journal import JournalTail
from pipeline.store.store import Store

LOG_TAIL_LINES = 25
NOT_BEGUN = "  stopped before it began; the same command goes on from here"


class Launcher(Protocol):
    """What `execute` needs of a launcher; `launch/` has them."""

    def command(self, job: Job) -> list[str]: ...

    def run(self, job: Job, environment: Mapping[str, str], watch: Any) -> int: ...


@dataclass
class Watcher:
    """Called while a step runs: shows what its journal says, and passes on the wish to stop."""

    job: Job
    progress: Progress
    interrupts: Interrupts
    supervision: Supervision
    journal: JournalTail
    asked: bool = False
    ended_because: str = ""
    """Why the step's processes were ended before they ended by themselves."""
    started: float = field(default_factory=time.time)

    def __call__(self) -> bool:
        self.read_journal()
        if self.interrupts.asked and not self.asked:
            self.asked = True
            self.job.files.request_stop()
            if not self.supervision.stateless:
                how = self.interrupts.how_to_insist
                self.progress.line(f"  stopping: the step saves its state at the next boundary ({how}: kill it)")
        if self.interrupts.insisted:
            self.ended_because = "killed on request, without a save"
        elif not self.ended_because:
            self.ended_because = self.supervision.look(self.journal.position, asked=self.asked) or ""
        return bool(self.ended_because)

    def read_journal(self) -> None:
        for event in self.journal.read():
            if (real(event.get("time")) or 0.0) >= self.started - 1:
                self.progress.event(self.job.step, event)


def execute(plan: Plan, store: Store, launchers: Mapping[str, Launcher], progress: Progress, *, jobs: int = 1) -> int:
    """Runs what the plan says, up to `jobs` steps at a time, and returns the exit code of the command."""
    started = time.monotonic()
    note_run(plan, store, progress)
    with Interrupts() as interrupts:

        def start(step: Step, progress: Progress, more: Mapping[str, str]) -> int:
            return run_step(step, plan.recipe.name, store, launchers, progress, interrupts, more)

        def is_made(name: str) -> bool:
            return store.find(plan.step(name).artifact_id) is not None

        if jobs == 1:
            code = walk(plan, start, is_made, progress, interrupts)
        else:
            code = Branches(plan, start, is_made, progress, interrupts, jobs).run()
    for line in summary(plan, store):
        progress.line(line)
    progress.line(
        f"{'done' if code == EXIT_DONE else f'stopped with exit code {code}'} after {seconds(time.monotonic() - started)}"
    )
    return code


def walk(plan: Plan, start: Start, is_made: Callable[[str], bool], progress: Progress, interrupts: Interrupts) -> int:
    """Takes one step after the other until one fails; returns the exit code."""
    chosen = plan.chosen
    for position, step in enumerate(chosen, start=1):
        head = f"[{position}/{len(chosen)}] {step.name}"
        begins = can_begin(step, is_made)
        progress.line(f"{head}  {what_it_does(step, begins)}")
        if step.action is Action.SKIP:
            continue
        if not begins:
            return EXIT_USER_ERROR
        if interrupts.asked:
            progress.line(NOT_BEGUN)
            return interrupts.exit_code
        code = start(step, progress, {})
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


def note_run(plan: Plan, store: Store, progress: Progress) -> None:
    """Records the plan as run by this process, and prints what the user should know of other records."""
    try:
        for sentence in store.record(plan.recipe.name, plan.record(store), running=True):
            progress.line(f"note: {sentence}")
    except StoreError:
        # Where nothing runs, nothing needs to be kept, and the store may be one that cannot be written.
        if any(step.action is not Action.SKIP for step in plan.chosen):
            raise


def run_step(
    step: Step,
    recipe: str,
    store: Store,
    launchers: Mapping[str, Launcher],
    progress: Progress,
    interrupts: Interrupts,
    more: Mapping[str, str],
) -> int:
    """Runs one step to its end; returns 0, 1, 2, 75 or 128 + a signal, having said why."""
    job = step.job(recipe, store)
    launchers[job.resources.launcher_name].command(job)  # One that cannot be said must not move anything.
    take_over(step.adopts, step.work, store)
    return run_job(job, step.recipe_step.stage, store, launchers, progress, interrupts, more)


def run_job(
    job: Job,
    stage: Stage,
    store: Store,
    launchers: Mapping[str, Launcher],
    progress: Progress,
    interrupts: Interrupts,
    more: Mapping[str, str] | None = None,
    wait_seconds: float | None = None,
) -> int:
    """Runs one job, with `more` variables in its environment, once nobody else runs it; returns 0, 1, 2, 75 or 128 + a signal,
    having said why.
    """
    launcher = launchers[job.resources.launcher_name]
    launcher.command(job)  # One that cannot be said must not move anything.
    with owned(job, progress.line, interrupts, wait_seconds) as ours:
        if not ours:
            progress.line(NOT_BEGUN)
            return interrupts.exit_code
        if store.find(job.artifact_id):
            progress.line(f"  {store.artifact_folder(job.artifact_id)} is made already")
            return EXIT_DONE
        return run_owned(job, stage, store, launcher, progress, interrupts, more or {})


def run_owned(
    job: Job,
    stage: Stage,
    store: Store,
    launcher: Launcher,
    progress: Progress,
    interrupts: Interrupts,
    more: Mapping[str, str],
) -> int:
    """Runs one job that is ours; returns what `run_job` does."""
    command = launcher.command(job)
    store.begin(job)
    progress.line(f"  $ {shlex.join(command)}")
    supervision = Supervision(job, stateless=not stage.distributed, say=lambda text: progress.line(f"  {text}"))
    watcher = Watcher(job, progress, interrupts, supervision, JournalTail(job.files.journal))
    environment = {**os.environ, **more, **environment_for(job, distributed=stage.distributed)}
    exit_code = launcher.run(job, environment, watcher)
    outcome = job.files.outcome()
    # A full disk may have taken the artifact, and not the word that it is done.
    ended_well = outcome.get("status") == "done" or (not outcome and exit_code == EXIT_DONE)
    if ended_well and (manifest := store.find(job.artifact_id)):
        progress.line(
            f"  made {job.artifact_id[:12]} in {seconds(manifest.wall_seconds)}: {headline(manifest.metrics, stage.headline)}"
        )
        return EXIT_DONE
    unsaved = supervision.not_saved()
    if outcome.get("status") == "preempted" and not unsaved:
        progress.line(f"  stopped after a clean save: {outcome.get('message', '')}; the same command goes on from here")
        return EXIT_PREEMPTED
    if watcher.ended_because:
        progress.line(f"  {watcher.ended_because}")
    if outcome.get("status") not in ("user_error", "crash") and (
        watcher.ended_because or interrupts.asked or outcome.get("status") in ("preempted", "stopped")
    ):
        return say_unsaved(job, outcome, watcher, unsaved, interrupts, progress)
    refused = outcome.get("message") if outcome.get("status") == "user_error" else unsaid(job, outcome)
    if refused:
        return say_refused(job, str(refused), outcome, progress)
    return say_crashed(job, outcome, exit_code, progress)


def say_refused(job: Job, refused: str, outcome: Mapping[str, Any], progress: Progress) -> int:
    """Says which mistake ended the step, and removes what is left of what it had written."""
    lines = refused.splitlines()
    if job.files.running() is None:
        error = outcome.get("error") if outcome.get("status") == "user_error" else None
        lines += rest_removed(job, error, lines)
    for line in lines:
        progress.line(f"  error: {line}")
    progress.line(f"  log: {job.files.log}")
    return EXIT_USER_ERROR


def say_crashed(job: Job, outcome: Mapping[str, Any], exit_code: int, progress: Progress) -> int:
    """Shows what there is of a crash: the signal that ended the processes' parent, the end of the log, the worker's word."""
    how = f"exit code {exit_code}"
    if not outcome and exit_code - 128 in set(signal.Signals):
        who = "process" if job.resources.launcher_name == "local" else "launcher"
        how += f": {signal.Signals(exit_code - 128).name} ended its {who}"
    lines = tail(job.files.log)
    told = f"The end of {job.files.log}:" if lines else f"Nothing was printed to {job.files.log}."
    progress.line(f"  the step crashed ({how}). {told}")
    for line in lines:
        progress.line(f"    {line}")
    if outcome.get("message"):
        progress.line(f"  {outcome.get('error')}: {outcome['message'].splitlines()[0]}")
    progress.line("  The same command tries again, from the newest complete checkpoint if there is one.")
    return EXIT_CRASH


def say_unsaved(
    job: Job,
    outcome: Mapping[str, Any],
    watcher: Watcher,
    unsaved: Sequence[int],
    interrupts: Interrupts,
    progress: Progress,
) -> int:
    """Says that a step ended without a save; returns 128 + the signal where the user asked for it, else 1."""
    if outcome.get("status") == "stopped":
        progress.line(f"  stopped: {outcome.get('message', '')}")
    elif not watcher.ended_because and unsaved:
        progress.line(f"  {names(unsaved, watcher.supervision.size)} ended without a save")
    progress.line(f"  log: {job.files.log}")
    progress.line("  The same command tries again, from the newest complete checkpoint if there is one.")
    if interrupts.asked:
        return interrupts.exit_code
    return int(outcome.get("exit_code", EXIT_CRASH)) if outcome.get("status") == "stopped" else EXIT_CRASH


def unsaid(job: Job, outcome: Mapping[str, Any]) -> str | None:
    """Why a step failed that could not say so itself, or put it down to something else; None if nobody knows better."""
    if not outcome and (running := job.files.running()):
        return f"{job.work} is being run by {running.who}; `slipway status` shows its log"
    if is_full(job.work_folder):
        said = f" ({outcome['error']}: {outcome.get('message', '')})" if outcome.get("error") else ""
        return f"{job.work}: the disk is full: {free_words(job.work_folder)}{said}. {MAKE_ROOM}"
    return None


def tail(path: Path, lines: int = LOG_TAIL_LINES, limit_bytes: int = 20_000) -> list[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]


def summary(plan: Plan, store: Store) -> list[str]:
    """The closing table: stages, times and headline metrics."""
    rows = []
    for step in plan.chosen:
        manifest: Manifest | None = store.find(step.artifact_id)
        if manifest:
            metrics = headline(manifest.metrics, step.recipe_step.stage.headline)
            rows.append([step.name, manifest.stage, step.artifact_id[:8], seconds(manifest.wall_seconds), metrics])
        else:
            rows.append([step.name, step.recipe_step.stage.kind, step.artifact_id[:8], "-", "not made"])
    return ["", *table(rows, ("step", "stage", "artifact", "time", "held-out metrics")), ""]
