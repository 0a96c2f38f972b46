"""Runs one job in this rank: `python -m pipeline.running.worker WORK_FOLDER`, started by torchrun, deepspeed or by hand.

Checks the world before anything is loaded, calls the stage, and in rank 0 commits what it made.

Ends with 0 (done), 1 (crash), 2 (the user's mistake, or a disk that refuses), 75 (stopped after a clean save) or, where it
was told to stop by signal N while there was nothing to save, 128 + N.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` stands, Ctrl-C ends this process as the other signals do: at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.cards.card import write_cards
from pipeline.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LaunchError,
    NothingSaved,
    Preempted,
    Problem,
    SlipwayError,
)
from pipeline.recipe.recipe import HUB
from pipeline.running.environment import environment_for, start_again_with_fixed_hashes
from pipeline.running.extending import checkpoint_to_extend
from pipeline.running.leftovers import failed_output_removed
from pipeline.running.lifeline import Lifeline, StopAtOnce
from pipeline.running.proving import prove_inputs
from pipeline.running.rendezvous import meet
from pipeline.running.stopping import Asking, Stopped, StopSignals
from pipeline.running.tracking import Followers, IsAsked
from pipeline.settings.strict import Reading, validate
from pipeline.stage import EXTENDS, Context, Result, Stage, World
from pipeline.store.artifact import digest_bytes
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.disk import refusal
from pipeline.store.durable import make_folder
from pipeline.store.job import Job, read_job
from pipeline.store.journal import Journal
from pipeline.store.proofs import remember
from pipeline.store.provenance import changes, git_state, library_versions, machine
from pipeline.store.store import Store
from pipeline.store.work_folder import InUseError, WorkFolder

PREPARATION_TIMEOUT_SECONDS = 3600.0
"""How long other ranks wait while rank 0 hashes the checkpoint to resume from."""


def world_of(environment: Mapping[str, str]) -> World:
    """The rank that torchrun or deepspeed gave this process; one process where they gave none."""
    return World(
        rank=int(environment.get("RANK", "0")),
        size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
    )


def fetch(place: str) -> Path:
    """The folder of an input; a hub model is brought here at exactly its revision."""
    if not place.startswith(HUB):
        return Path(place)
    repository, _, revision = place.removeprefix(HUB).partition("@")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def hub_inputs(places: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Role -> (repository, revision) of the inputs that come from the hub."""
    of_hub = {role: place.removeprefix(HUB).split("@") for role, place in places.items() if place.startswith(HUB)}
    return {role: (repository, revision) for role, (repository, revision) in of_hub.items()}


def run_job(
    job: Job,
    stages: Mapping[str, Stage],
    world: World,
    stop: StopSignals,
    lifeline: Lifeline,
    followers: Followers | None = None,
) -> None:
    """Runs the job in this rank; rank 0 commits the artifact, and has it followed. Raises what went wrong."""
    if world.size != job.resources.world_size:
        hint = "Start it with the command that `slipway job` printed, or change `resources` in the recipe."
        wanted = job.resources.world_size
        raise LaunchError(Problem(job.work, f"is a job for {wanted} processes, and {world.size} were started", hint))
    meet(job.work_folder, world, "start", runs=what_runs(job) if job.resources.nodes > 1 else None)
    store = Store(Path(job.store))
    if store.find(job.artifact_id):
        say(f"rank {world.rank}: {store.artifact_folder(job.artifact_id)} is made already: nothing to do", sys.stdout)
        return
    with contextlib.ExitStack() as stack:
        if world.is_main:
            stack.enter_context(job.files.locked())
            stack.enter_context(job.files.time_kept())
        run_locked(job, stages, world, store, stop, lifeline, followers or Followers({}))


def what_runs(job: Job) -> dict[str, str]:
    """What must be the same on every node: code, Python, libraries, the kind of device and the job."""
    commit, changed = git_state()
    found = machine("cpu" if job.resources.uses_cpu else "cuda")
    return {
        "commit": f"{(commit or 'unknown')[:12]}{' with changes' if changed else ''}",
        **{name: found[name] for name in ("python", "device")},
        "the job": digest_bytes(job.model_dump_json().encode())[:12],
        **library_versions(),
    }


def run_locked(
    job: Job,
    stages: Mapping[str, Stage],
    world: World,
    store: Store,
    stop: StopSignals,
    lifeline: Lifeline,
    followers: Followers,
) -> None:
    stage, work, files = stages[job.kind], job.work_folder, job.files
    params, problems = validate(stage.params, job.params, f"{files.job_file}: params", Reading([work]))
    if params is None:
        raise LaunchError(*problems)
    if not stage.distributed:
        lifeline.every_poll = StopAtOnce(files, lambda number: report(files, lifeline, Stopped(number)))

    asking = Asking(stop, lifeline)
    environment = machine("cpu" if job.resources.uses_cpu else "cuda")
    checkpoints = store.checkpoints(
        job.step, job.artifact_id, job.resources.keep_checkpoints, {**environment, **library_versions()}
    )
    journal = Journal(files.journal, writes=world.is_main)
    if world.is_main:
        prove_inputs(job, journal, stop)
        prepare_folder(files, checkpoints, journal, job.inputs.get(EXTENDS))
    meet(work, world, "prepared", PREPARATION_TIMEOUT_SECONDS)
    step, extends = files.read_start()
    if world.is_main:
        followers.start(job, step)
    context = Context(
        inputs={role: fetch(place) for role, place in job.inputs.items()},
        out=files.out,
        work=work,
        resume=checkpoints.path(step) if step is not None else None,
        checkpoints=checkpoints,
        seed=job.seed,
        resources=job.resources,
        journal=journal,
        world=world,
        stop_requested=asking.at_boundary,
        going_on_alone=asking.within,
        hub=hub_inputs(job.inputs),
        extends=extends,
    )
    started = time.monotonic()
    with failed_output_removed(job, world):
        stop.at_once = not stage.distributed
        try:
            result = stage.run(context, params)
        finally:
            stop.at_once = False
        if world.is_main:
            lifeline.commit()
            seconds = files.spent_seconds + time.monotonic() - started
            commit(job, context, result, stages, store, environment, seconds)


def commit(
    job: Job,
    context: Context,
    result: Result,
    stages: Mapping[str, Stage],
    store: Store,
    environment: Mapping[str, str],
    seconds: float,
) -> None:
    """Puts what the stage made into the store, with its card, and removes what the step needs no more."""
    write_cards(job, context.inputs, context.out, result, stages)
    manifest = store.commit(
        job, result.metrics, result.facts, environment=dict(environment), wall_seconds=seconds,
        device="cpu" if job.resources.uses_cpu else "cuda", world_size=context.world.size,
    )  # fmt: skip
    remember(store.artifact_folder(job.artifact_id), manifest.files)
    if keeps := job.resources.keep_last_checkpoint and bool(context.checkpoints.steps()):
        replace(context.checkpoints, keep=1).rotate()
    job.files.finish(keep_checkpoints=keeps)


def prepare_folder(files: WorkFolder, checkpoints: Checkpoints, journal: Journal, extended: str | None = None) -> None:
    """Leaves an empty `out/` and only checkpoints that verify, and tells all ranks which one to resume from.

    Where the step makes a training longer, they are told the last one of the training that made `extended`, too.
    """
    files.clear_output()
    newest = checkpoints.newest()
    # Now, and not when the stage has loaded: who reads along is not shown twice what comes again.
    journal.rewind(-1 if newest.path is None else newest.step)
    for sentence in newest.passed_over:
        journal.note(sentence)
    checkpoints.discard_after(newest.step)
    make_folder(checkpoints.folder)
    changed = changes(checkpoints.environment_of(newest.step), checkpoints.environment) if newest.path else []
    if changed:
        journal.note(f"checkpoint {newest.step} was written under other versions: {', '.join(changed)}")
    extends = checkpoint_to_extend(Path(extended), needed=newest.path is None) if extended else None
    files.write_start(newest.step if newest.path else None, extends)


def say(text: str, stream: TextIO) -> None:
    """Prints a line; on a disk that is full it goes without."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def main(arguments: list[str], stages: Mapping[str, Stage], trackers: Mapping[str, IsAsked] | None = None) -> int:
    """Runs the job in the folder that the last argument names, shown on trackers; returns the exit code.

    The deepspeed launcher puts `--local_rank=N` before it.
    """
    followers = Followers(trackers or {})
    exit_code = run(arguments, stages, followers)
    followers.end(exit_code)
    return exit_code


def run(arguments: list[str], stages: Mapping[str, Stage], followers: Followers) -> int:
    """Runs the job, says how it ended, and returns the exit code."""
    folders = [argument for argument in arguments if not argument.startswith("--")]
    if len(folders) != 1:
        print("usage: python -m pipeline.running.worker WORK_FOLDER", file=sys.stderr)
        return EXIT_USER_ERROR
    work = Path(folders[0]).absolute()
    files = WorkFolder(work)
    world = world_of(os.environ)
    stop = StopSignals(files, world.is_main)
    lifeline = Lifeline(work, world.rank)
    try:
        stop.install()
        job = read_job(work)
        lifeline.start(arguments)
        os.environ.update(environment_for(job, distributed=stages[job.kind].distributed))
        run_job(job, stages, world, stop, lifeline, followers)
    except Preempted as saved:
        say(f"rank {world.rank}: stopped after a clean save: {saved}", sys.stderr)
        report(files, lifeline, saved)
        return EXIT_PREEMPTED
    except (Stopped, NothingSaved) as ended:
        stopped = ended if isinstance(ended, Stopped) else Stopped(stop.number)
        say(f"rank {world.rank}: {stopped}", sys.stderr)
        report(files, lifeline, stopped)
        return stopped.exit_code
    except InUseError as error:
        # The folder is another run's: how this one ends is not written there.
        say(f"rank {world.rank}: {error}", sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        stop.at_once = False
        return failed(error, files, lifeline)
    lifeline.end("done")
    if world.is_main:
        files.report(world.rank, "done")
    return EXIT_DONE


def failed(error: Exception, files: WorkFolder, lifeline: Lifeline) -> int:
    """Says why the job failed; returns its exit code."""
    refused = error if isinstance(error, SlipwayError) else refusal(error, files.path)
    if refused is not None:
        say(f"rank {lifeline.rank}: {refused}", sys.stderr)
        report(files, lifeline, refused)
        return EXIT_USER_ERROR
    say("".join(traceback.format_exception(error)), sys.stderr)
    report(files, lifeline, error)
    return EXIT_CRASH


def report(files: WorkFolder, lifeline: Lifeline, end: BaseException) -> None:
    """Writes how this rank ended, and with it the job, unless another rank has ended first."""
    fields: dict[str, Any] = {"message": str(end).strip()[:2000]}
    match end:
        case Preempted():
            status = "preempted"
        case Stopped():
            status, fields["exit_code"] = "stopped", end.exit_code
        case SlipwayError():
            status, fields = "user_error", {"error": type(end).__name__, "message": str(end)}
        case _:
            status, fields["error"] = "crash", type(end).__name__
    lifeline.end(status)
    files.report(lifeline.rank, status, **fields)


def leave(exit_code: int) -> NoReturn:
    """Ends the process with what was registered for its end, and without the interpreter's own.

    A thread of the process group that still holds a tensor then asks for Python's lock, gets none, and takes the process with
    it (SIGABRT, "terminate called without an active exception", see PyTorch's pull request 179291): of a rank that had done
    its part, which its launcher takes for a crash, and ends the others.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    start_again_with_fixed_hashes()
    from stages import STAGES
    from trackers import TRACKERS

    leave(main(sys.argv[1:], STAGES, TRACKERS))
