"""`slipway status`: the state of every step, and what a scheduler says of those that were submitted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import LaunchError
from pipeline.figures import headline, seconds, table
from pipeline.running.plan import Plan
from pipeline.store.journal import read_journal
from pipeline.store.store import Store, is_there
from pipeline.store.work_folder import WorkFolder
from pipeline.store.works import read_work, work_folders


def step_status(
    store: Store, recipe: str, name: str, kind: str, artifact_id: str, state: str, work: Path | None = None
) -> dict[str, Any]:
    work = work or store.work_folder(name, artifact_id)
    running = store.running(work)
    manifest = store.find(artifact_id)
    entry: dict[str, Any] = {"recipe": recipe, "step": name, "stage": kind, "artifact_id": artifact_id}
    if manifest:
        entry |= {"state": "made", "created_at": manifest.created_at, "wall_seconds": manifest.wall_seconds}
        entry["metrics"] = manifest.metrics
    elif running:
        entry |= {
            "state": "running",
            "since": running.since,
            "pid": running.process.pid if running.process else None,
            "host": running.process.host if running.process else None,
            "log": running.log,
        }
        last = [event for event in read_journal(WorkFolder(work).journal) if is_step(event)]
        if last:
            entry |= {"at_step": last[-1].get("step"), "total_steps": last[-1].get("total_steps")}
    else:
        files = WorkFolder(work)
        outcome = files.outcome()
        failed = outcome.get("status") in ("user_error", "crash")
        entry["state"] = "failed" if failed else state
        if is_there(files.log):
            entry["log"] = str(files.log)
        if is_there(files.batch_script):
            entry["work"] = str(work)
        if failed:
            entry["message"] = str(outcome.get("message", ""))
    return entry


def with_queue(
    entries: list[dict[str, Any]], queued: Callable[[], Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries with what the scheduler says of steps that were submitted; it is asked only if there are any.

    Also what is to be said where it does not answer.
    """
    submitted = [entry for entry in entries if "work" in entry]
    if not submitted:
        return entries, []
    try:
        known = queued()
    except LaunchError as error:
        return entries, [f"what became of submitted steps is not known: {error}"]
    for entry in submitted:
        if found := known.get(entry["work"]):
            entry |= {"state": "queued", "job": found.job_id, "message": str(found)}
            entry |= {"queue_state": found.state, "queue_reason": found.reason, "nodes": found.nodes}
    return entries, []


def is_step(event: Any) -> bool:
    return isinstance(event, Mapping) and event.get("event") == "step" and isinstance(event.get("step"), int)


def plan_status(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """State of every step of a recipe."""
    return [
        step_status(
            store, plan.recipe.name, step.name, step.recipe_step.stage.kind, step.artifact_id,
            "interrupted" if step.reason.checkpoint else "not made", step.adopts,
        )
        for step in plan.steps
    ]  # fmt: skip


def store_status(store: Store) -> list[dict[str, Any]]:
    """State of every step of every recipe that ran in the store.

    Of what was run with `--set` before, and of what still runs though its recipe was changed, the steps that differ.
    """
    records = store.records()
    begun = {work.artifact_id: work.folder for work in map(read_work, work_folders(store.work))}
    newest = records.newest()
    older = [plan for plan in records.plans if plan not in newest] + records.replaced
    names = Counter(plan.name for plan in newest)
    entries = []
    told: set[tuple[str, str]] = set()
    for plan in [*newest, *older]:
        label = plan.label if names[plan.name] < 2 else f"{plan.label} ({plan.path})"
        for name, step in plan.steps.items():
            if plan not in newest and (plan.path, step.artifact_id) in told:
                continue
            told.add((plan.path, step.artifact_id))
            work = begun.get(step.artifact_id)
            state = "interrupted" if work else "not made"
            entry = step_status(store, plan.name, name, step.kind, step.artifact_id, state, work)
            entries.append({**entry, "path": plan.path, "overrides": plan.overrides, "label": label})
    return entries


def status_lines(entries: list[dict[str, Any]], store: Store) -> list[str]:
    if not entries:
        return [f"no recipe has run in {store.folder}"]
    rows = []
    for entry in entries:
        detail = headline(entry.get("metrics", {}), ())
        if entry["state"] == "running":
            since = seconds(time.time() - entry["since"])
            of = f" of {entry['total_steps']}" if entry.get("total_steps") else ""
            at = f", step {entry['at_step']}{of}" if "at_step" in entry else ""
            who = f"process {entry['pid']} on {entry['host']}" if entry["pid"] else "just starting"
            detail = f"for {since}{at}; {who}; log {entry['log']}"
        elif entry["state"] != "made":
            said = f"{entry.get('message', '').partition(chr(10))[0]:.120}"
            detail = "; ".join(filter(None, [said, f"log {entry['log']}" if "log" in entry else ""]))
        recipe = entry.get("label", entry["recipe"])
        rows.append([recipe, entry["step"], entry["stage"], entry["state"], entry["artifact_id"][:8], detail])
    return table(rows, ("recipe", "step", "stage", "state", "artifact", ""))
