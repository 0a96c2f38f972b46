"""Runs jobs one after the other in this process: `python training_driver.py JOBS.json`, alone or under torchrun.

A stand-in for the worker: it builds a Context, runs the stage and writes what it returned. It can also make the process
kill itself, or be asked to stop, at a given step.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import Preempted, SlipwayError
from pipeline.running.worker import leave
from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.lib.processes.collectives import barrier
from stages.lib.processes.joining import leave_processes
from stages.lib.training import loop as training

WORLD = World(
    rank=int(os.environ.get("RANK", "0")),
    size=int(os.environ.get("WORLD_SIZE", "1")),
    local_rank=int(os.environ.get("LOCAL_RANK", "0")),
)
ON_POLICY = tuple(f"stages.alignment.{kind}" for kind in ("ppo", "grpo", "rloo", "reinforce_plus_plus", "online_dpo"))
SAMPLING = "stages.alignment.sample_preferences"


def is_last() -> bool:
    return WORLD.rank == WORLD.size - 1


UNWATCHED = (training.Training.loss, training.Training.heldout, torch.save)


class Steps:
    """The step that training is in, seen from outside."""

    now = 0
    measured = -1
    """The step that is being measured on held-out rows."""


def watch(job: dict[str, Any]) -> None:
    """Lets this process die where the job says so."""
    compute_loss, heldout, save = UNWATCHED
    saves = is_last() if job["resources"].get("deepspeed") else WORLD.is_main
    die = job["die"] or {}
    if job["kind"] in ON_POLICY:
        from tests.distributed import interruptions

        interruptions.watch(die, WORLD.rank == die.get("rank", WORLD.size - 1))
        return

    if job["kind"] == SAMPLING:
        from tests.distributed import sampling_interruptions

        sampling_interruptions.watch(die, WORLD.rank == die.get("rank"))
        return

    def watched_loss(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        Steps.now = self.progress.step + 1
        if is_last() and die.get("during") == "step" and Steps.now == die["step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(self, *arguments, **options)

    def watched_heldout(self: Any) -> dict[str, float]:
        Steps.measured = self.progress.step
        return heldout(self)

    def watched_save(value: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if saves and die.get("during") == "checkpoint" and f"checkpoint-{die['step']}/" in str(file):
            whole = io.BytesIO()
            save(value, whole)
            Path(file).write_bytes(whole.getvalue()[: whole.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, file, *arguments, **options)

    training.Training.loss = watched_loss  # type: ignore[method-assign]
    training.Training.heldout = watched_heldout  # type: ignore[method-assign]
    torch.save = watched_save


def run(job: dict[str, Any]) -> None:
    work = Path(job["work"])
    out = work / "out"
    checkpoints = Checkpoints(work / "checkpoints", keep=job["resources"].get("keep_checkpoints", 2))
    Steps.now, Steps.measured = 0, -1
    watch(job)
    if WORLD.is_main:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        checkpoints.folder.mkdir(exist_ok=True)
        newest = checkpoints.newest()
        checkpoints.discard_after(newest.step)
        if newest.path is None:
            Journal(work / "journal.jsonl", writes=True).rewind(-1)
    barrier()  # the first job has nothing to discard
    stage = importlib.import_module(job["kind"]).STAGE
    stop = job["stop"] or {}

    def stop_requested() -> bool:
        if job["kind"] in ON_POLICY:
            from tests.distributed import interruptions

            return is_last() and bool(stop) and interruptions.stop_is_due(stop)
        if job["kind"] == SAMPLING:
            from tests.distributed import sampling_interruptions

            return is_last() and bool(stop) and sampling_interruptions.stop_is_due(stop)
        late = Steps.now >= stop.get("step", sys.maxsize)
        return is_last() and (late or Steps.measured == stop.get("heldout_at_step"))

    asked = itertools.count(1)

    def going_on_alone() -> bool:
        if not is_last() or stop.get("during") != "scoring":
            return False
        from tests.distributed import interruptions

        return interruptions.Place.rollout == stop["scored"] and next(asked) >= stop["asked"]

    context = Context(
        inputs={role: Path(path) for role, path in job["inputs"].items()},
        out=out,
        work=work,
        resume=checkpoints.newest().path,
        checkpoints=checkpoints,
        seed=job["seed"],
        resources=Resources(**{"device": "cpu", "threads": 1, "processes": WORLD.size, **job["resources"]}),
        journal=Journal(work / "journal.jsonl", writes=WORLD.is_main),
        world=WORLD,
        stop_requested=stop_requested,
        going_on_alone=going_on_alone,
        extends=Path(job["extends"]) if job["extends"] else None,
    )
    try:
        result = stage.run(context, stage.params(**job["params"]))
    except Preempted as stopped:
        if WORLD.is_main:
            (work / "preempted").write_text(str(stopped))
        return
    except SlipwayError as error:
        if not job["may_fail"]:
            raise
        sys.stdout.write(f"{error}\n")  # at once: another process writes to the same pipe
        return
    if WORLD.is_main:
        content = {"metrics": dict(result.metrics), "facts": result.facts.model_dump()}
        (work / "result.json").write_text(json.dumps(content))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_bytes()):
        run(job)
    leave_processes()
    leave(0)
