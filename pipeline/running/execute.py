"""Walks a plan: hands each step's job to its launcher, shows its progress, stops at the first failure."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR
from pipeline.figures import headline, real, seconds, table
from pipeline.running.plan import Action, Plan, Step
from pipeline.running.progress import Progress
from pipeline.store.artifact import Manifest, read_manifest
from pipeline.store.job import Job
from pipeline.store.journal import read_event
from pipeline.store.store import Store

LOG_TAIL_LINES = 25


class Launcher(Protocol):
    """What `execute` needs of a launcher; `launch/` has them."""

    def command(self, job: Job) -> list[str]: ...

    def run(self, job: Job, watch: Any) -> int: ...


@dataclass
class Interrupts(AbstractContextManager["Interrupts"]):
    """Counts SIGINT and SIGTERM: the first asks the running step to save and stop, the second kills it."""

    progress: Progress
    count: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class Watcher:
    """Called while a step runs: shows what its journal says, and passes on the wish to stop."""

    job: Job
    progress: Progress
    interrupts: Interrupts
    killable: bool
    """Whether the step has no state worth saving: the first interrupt ends it."""
    position: int = 0
    asked: bool = False
    started: float = field(default_factory=time.time)

    def __call__(self) -> bool:
        self.read_journal()
        if self.interrupts.count and not self.asked:
            self.asked = True
            (self.job.work_folder / "stop-requested").touch()
            if not self.killable:
                self.progress.line("  stopping: the step saves its state at the next boundary (once more: kill it)")
        return self.interrupts.count > (0 if self.killable else 1)

    def read_journal(self) -> None:
        path = self.job.work_folder / "journal.jsonl"
        try:
            if path.stat().st_size < self.position:
                self.position = 0
            with path.open("rb") as file:
                file.seek(self.position)
                data = file.read()
        except OSError:
            return
        whole = data.rfind(b"\n") + 1
        self.position += whole
        for line in data[:whole].splitlines():
            event = read_event(line)
            if event and (real(event.get("time")) or 0.0) >= self.started - 1:
                self.progress.event(self.job.step, event)


def execute(plan: Plan, store: Store, launchers: Mapping[str, Launcher], progress: Progress) -> int:
    """Runs what the plan says and returns the exit code of the command."""
    started = time.monotonic()
    chosen = plan.chosen
    if any(step.action is not Action.SKIP for step in chosen):
        store.record(plan.recipe.name, plan.record())
    code = EXIT_DONE
    with Interrupts(progress) as interrupts:
        for position, step in enumerate(chosen, start=1):
            head = f"[{position}/{len(chosen)}] {step.name}"
            if step.action is Action.SKIP:
                progress.line(f"{head}  skip  {step.reason}")
                continue
            progress.line(f"{head}  {step.action}  {step.reason}")
            if step.action is Action.BLOCKED:
                code = EXIT_USER_ERROR
                break
            code = run_step(step, plan.recipe.name, store, launchers, progress, interrupts)
            if code != EXIT_DONE:
                break
    for line in summary(plan, store):
        progress.line(line)
    progress.line(
        f"{'done' if code == EXIT_DONE else f'stopped with exit code {code}'} after {seconds(time.monotonic() - started)}"
    )
    return code


def run_step(
    step: Step,
    recipe: str,
    store: Store,
    launchers: Mapping[str, Launcher],
    progress: Progress,
    interrupts: Interrupts,
) -> int:
    """Runs one step to its end; returns 0, 1, 2 or 75, having said why."""
    job = step.job(recipe, store)
    launcher = launchers[job.resources.launcher]
    command = launcher.command(job)
    store.begin(job)
    progress.line(f"  $ {shlex.join(command)}")
    watcher = Watcher(job, progress, interrupts, killable=not step.recipe_step.stage.distributed)
    exit_code = launcher.run(job, watcher)
    folder = store.artifact_folder(job.artifact_id)
    outcome = read_outcome(job.work_folder)
    if outcome.get("status") == "done" and store.find(job.artifact_id):
        manifest = read_manifest(folder)
        progress.line(
            f"  made {job.artifact_id[:12]} in {seconds(manifest.wall_seconds)}: {headline(manifest.metrics, step.recipe_step.stage.headline)}"
        )
        return EXIT_DONE
    if interrupts.count and outcome.get("status") in (None, "preempted"):
        progress.line("  stopped; the same command goes on from here")
        return EXIT_PREEMPTED
    log = job.work_folder / "log.txt"
    if outcome.get("status") == "preempted":
        progress.line(f"  stopped after a clean save: {outcome.get('message', '')}")
        return EXIT_PREEMPTED
    if outcome.get("status") == "user_error":
        for line in str(outcome.get("message", "")).splitlines():
            progress.line(f"  error: {line}")
        progress.line(f"  log: {log}")
        return EXIT_USER_ERROR
    progress.line(f"  the step crashed (exit code {exit_code}). The end of {log}:")
    for line in tail(log):
        progress.line(f"    {line}")
    if outcome.get("message"):
        progress.line(f"  {outcome.get('error')}: {outcome['message'].splitlines()[0]}")
    progress.line("  The same command tries again, from the newest complete checkpoint if there is one.")
    return EXIT_CRASH


def read_outcome(work: Path) -> dict[str, Any]:
    """How the worker says the job ended; empty if it could not say."""
    try:
        value = json.loads((work / "outcome.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


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
