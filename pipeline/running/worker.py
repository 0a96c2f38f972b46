"""Runs one job in this rank: `python -m pipeline.running.worker WORK_FOLDER`, started by torchrun, deepspeed or by hand.

Checks the world before anything is loaded, calls the stage, and in rank 0 commits what it made.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LaunchError,
    Preempted,
    Problem,
    SlipwayError,
)
from pipeline.recipe.recipe import HUB
from pipeline.running.environment import environment_for, start_again_with_fixed_hashes, uses_cpu
from pipeline.running.lifeline import Lifeline, StopAtOnce
from pipeline.running.rendezvous import meet
from pipeline.settings.strict import Reading, validate
from pipeline.stage import Context, Stage, World
from pipeline.store.artifact import write_json
from pipeline.store.job import Job, read_job
from pipeline.store.journal import Journal
from pipeline.store.store import Store, remove

OUTCOME = "outcome.json"


STOP_REQUEST = "stop-requested"


STOP_POLL_SECONDS = 0.5


PREPARATION_TIMEOUT_SECONDS = 3600.0
"""How long other ranks wait while rank 0 hashes the checkpoint to resume from."""


def world_of(environment: Mapping[str, str]) -> World:
    """The rank that torchrun or deepspeed gave this process; one process where they gave none."""
    return World(
        rank=int(environment.get("RANK", "0")),
        size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
    )


@dataclass
class StopSignals:
    """Turns signals into a flag that the stage asks for at its boundaries; a stage without state stops at once."""

    work: Path
    is_main: bool
    at_once: bool
    asked: bool = False
    looked_at: float = field(default=0.0)

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.at_once:
            raise Preempted(f"received {signal.Signals(number).name}")

    def __call__(self) -> bool:
        """True once this rank was signalled, or the work folder holds a request to stop (which rank 0 looks for)."""
        now = time.monotonic()
        if self.is_main and not self.asked and now - self.looked_at > STOP_POLL_SECONDS:
            self.looked_at = now
            self.asked = (self.work / STOP_REQUEST).exists()
        return self.asked


def fetch(place: str) -> Path:
    """The folder of an input; a hub model is brought here at exactly its revision."""
    if not place.startswith(HUB):
        return Path(place)
    repository, _, revision = place.removeprefix(HUB).partition("@")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def run_job(job: Job, stages: Mapping[str, Stage], world: World, lifeline: Lifeline) -> None:
    """Runs the job in this rank; rank 0 commits the artifact. Raises what went wrong."""
    stage = stages[job.kind]
    if world.size != job.resources.world_size:
        hint = "Start it with the command that `slipway job` printed, or change `resources` in the recipe."
        wanted = job.resources.world_size
        raise LaunchError(Problem(job.work, f"is a job for {wanted} processes, and {world.size} were started", hint))
    meet(job.work_folder, world, "start")
    store = Store(Path(job.store))
    if store.find(job.artifact_id):
        print(f"rank {world.rank}: {store.artifact_folder(job.artifact_id)} is made already: nothing to do")
        return
    lock = store.locked(job.work_folder) if world.is_main else contextlib.nullcontext()
    with lock:
        run_locked(job, stage, world, store, lifeline)


def run_locked(job: Job, stage: Stage, world: World, store: Store, lifeline: Lifeline) -> None:
    work = job.work_folder
    params, problems = validate(stage.params, job.params, f"{work}/job.json: params", Reading([work]))
    if params is None:
        raise LaunchError(*problems)
    stop = StopSignals(work, world.is_main, at_once=not stage.distributed)
    stop.install()
    if stop.at_once:
        lifeline.every_poll = StopAtOnce(work / STOP_REQUEST, lambda: report(work, world, "preempted", lifeline))

    def stop_requested() -> bool:
        lifeline.boundary()
        return stop()

    checkpoints = store.checkpoints(job.step, job.artifact_id, job.resources.keep_checkpoints)
    journal = Journal(work / "journal.jsonl", writes=world.is_main)
    out = work / "out"
    if world.is_main:
        if out.exists():
            remove(out)
        out.mkdir(parents=True)
        newest = checkpoints.newest()
        for sentence in newest.passed_over:
            journal.note(sentence)
        checkpoints.discard_after(newest.step)
        checkpoints.folder.mkdir(exist_ok=True)
        if newest.path is None:
            journal.rewind(-1)
            for sentence in newest.passed_over:
                journal.note(sentence)
        write_json(work / "start.json", {"resume": newest.step if newest.path else None})
    meet(work, world, "prepared", PREPARATION_TIMEOUT_SECONDS)
    step = json.loads((work / "start.json").read_bytes())["resume"]
    context = Context(
        inputs={role: fetch(place) for role, place in job.inputs.items()},
        out=out,
        work=work,
        resume=checkpoints.path(step) if step is not None else None,
        checkpoints=checkpoints,
        seed=job.seed,
        resources=job.resources,
        journal=journal,
        world=world,
        stop_requested=stop_requested,
    )
    started = time.monotonic()
    result = stage.run(context, params)
    if world.is_main:
        wall_seconds = wall_before(work) + time.monotonic() - started
        device = "cpu" if uses_cpu(job.resources) else "cuda"
        store.commit(job, result.metrics, result.facts, wall_seconds=wall_seconds, device=device, world_size=world.size)
        store.finish(job)


def wall_before(work: Path) -> float:
    """Seconds that earlier, interrupted runs of this step took."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return float(json.loads((work / "spent.json").read_bytes())["seconds"])
    return 0.0


@contextlib.contextmanager
def time_kept(work: Path, world: World) -> Iterator[None]:
    """Adds the seconds of an interrupted run to `spent.json`, so that the manifest's wall time counts them all."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        if world.is_main and work.is_dir():
            with contextlib.suppress(OSError):
                write_json(work / "spent.json", {"seconds": wall_before(work) + time.monotonic() - started})
        raise


def report(work: Path, world: World, status: str, lifeline: Lifeline, **fields: Any) -> None:
    """Writes how this rank ended, and how the job did: the first rank to say so is heard, but an error outranks `done`."""
    lifeline.end(status)
    path = work / OUTCOME
    if status != "done" and path.exists() and json.loads(path.read_bytes()).get("status") not in ("done", None):
        return
    with contextlib.suppress(OSError):
        write_json(path, {"status": status, "rank": world.rank, **fields})


def main(arguments: list[str], stages: Mapping[str, Stage]) -> int:
    """Runs the job in the folder that the last argument names; returns the exit code.

    The deepspeed launcher puts `--local_rank=N` before it.
    """
    folders = [argument for argument in arguments if not argument.startswith("--")]
    if len(folders) != 1:
        print("usage: python -m pipeline.running.worker WORK_FOLDER", file=sys.stderr)
        return EXIT_USER_ERROR
    work = Path(folders[0]).absolute()
    world = world_of(os.environ)
    lifeline = Lifeline(work, world.rank)
    try:
        job = read_job(work)
        lifeline.start(arguments)
        os.environ.update(environment_for(job, distributed=stages[job.kind].distributed))
        with time_kept(work, world):
            run_job(job, stages, world, lifeline)
    except Preempted as stop:
        print(f"rank {world.rank}: stopped after a clean save: {stop}", file=sys.stderr)
        report(work, world, "preempted", lifeline, message=str(stop))
        return EXIT_PREEMPTED
    except SlipwayError as error:
        print(f"rank {world.rank}: {error}", file=sys.stderr)
        report(work, world, "user_error", lifeline, error=type(error).__name__, message=str(error))
        return EXIT_USER_ERROR
    except Exception as error:
        traceback.print_exc()
        report(work, world, "crash", lifeline, error=type(error).__name__, message=str(error).strip()[:2000])
        return EXIT_CRASH
    if world.is_main:
        report(work, world, "done", lifeline)
    lifeline.end("done")
    return EXIT_DONE


if __name__ == "__main__":
    start_again_with_fixed_hashes()
    from stages import STAGES

    sys.exit(main(sys.argv[1:], STAGES))
