"""Tries a profile on its cluster, for `slipway doctor --cluster`: would SLURM take the jobs, and do nodes work together?

`python -m launch.clusters.trial FOLDER NODES BACKEND` is what the job of a trial runs on its first node.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.clusters.profile import Request, minutes
from launch.clusters.script import preparation, quoted, require_printable, what_is_asked
from launch.clusters.slurm import Partition, Slurm
from launch.probe import ANSWER
from launch.srun import across_nodes
from pipeline.errors import LaunchError, Problem

POLL_SECONDS = 0.5
SETTLING_SECONDS = 15.0
"""How long what an ended job wrote may take to be seen here: filesystems on a network remember for a while what was not there."""
LONGEST_MINUTES = 10
SCRIPT = "slipway-doctor.sh"
CONSOLE = "slipway-doctor.log"
SAID_LINES = 3


@dataclass(frozen=True)
class Verdict:
    """What was found of one thing that was tried."""

    state: Literal["ok", "warn", "missing"]
    subject: str
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Asked:
    """What a kind of job asks the scheduler for."""

    what: str
    request: Request
    on_gpu: bool


def trials(slurm: Slurm, store: Path, kinds: Mapping[str, bool], nodes: int, patience: float) -> Iterator[Verdict]:
    """A verdict each on the scheduler, on what the profile asks for every kind of job, and on nodes that work together.

    `kinds`: kind of stage -> whether it trains. A trial's job gives up its place in the queue after `patience` seconds.
    """
    try:
        partitions = slurm.partitions()
    except LaunchError as error:
        problem = problem_of(error)
        yield Verdict("missing", "scheduler", problem.what, problem.hint)
        return
    yield Verdict("ok", "scheduler", "; ".join(map(str, partitions)))
    wanted = requests(slurm, kinds)
    verdicts = [request_verdict(slurm, each, partitions) for each in wanted]
    yield from verdicts
    training = wanted[0]
    tried = [each for each in wanted[1:] if not each.on_gpu and on_other_nodes(each.request, training.request)]
    for each, verdict in zip(wanted, verdicts, strict=True):
        if verdict.state != "missing" and (each is training or each in tried[:1]):
            yield nodes_verdict(slurm, each, nodes if each is training else 1, store, patience)


def requests(slurm: Slurm, kinds: Mapping[str, bool]) -> list[Asked]:
    """What is asked for: by steps that train, by those on CPUs if that differs, and by each kind of stage the profile names."""
    found = [Asked("steps that train", *slurm.request("", may_use_gpu=True))]
    on_cpu = Asked("steps on CPUs", *slurm.request("", may_use_gpu=False))
    if (on_cpu.request, on_cpu.on_gpu) != (found[0].request, found[0].on_gpu):
        found.append(on_cpu)
    named = slurm.profile.stages
    return found + [Asked(f"steps of kind {kind}", *slurm.request(kind, may_use_gpu=kinds[kind])) for kind in named]


def on_other_nodes(one: Request, other: Request) -> bool:
    """Whether two requests may lead to different nodes."""
    return any(getattr(one, name) != getattr(other, name) for name in ("partition", "constraint", "reservation"))


def request_verdict(slurm: Slurm, each: Asked, partitions: Sequence[Partition]) -> Verdict:
    """Whether the scheduler would take such a job, of one node and one process."""
    options = [*what_is_asked(each.request, 1, 1, on_gpu=each.on_gpu), *each.request.sbatch]
    try:
        said = slurm.would_begin(options)
    except LaunchError as error:
        hint = f"It was asked for {' '.join(options[2:]) or 'one node'}; compare the profile with the partitions above."
        return Verdict("missing", "requests", f"{each.what}: {problem_of(error).what}", hint)
    names = (each.request.partition or "").split(",")
    mine = [part for part in partitions if part.name in names or (not each.request.partition and part.is_default)]
    limits = [part.limit_minutes for part in mine]
    if each.request.time is None:
        given = ", ".join(f"{part.default_time} in {part.name}" for part in mine)
        hint = "Write `time` in the profile: what needs longer is queued again and goes on."
        return Verdict("warn", "requests", f"{each.what}: no time is asked for, so the default holds: {given}", hint)
    if limits and None not in limits and minutes(each.request.time) > max(limit for limit in limits if limit):
        what = f"{each.what}: asks for {each.request.time}, and waits for ever: {'; '.join(map(str, mine))}"
        return Verdict("missing", "requests", what, "Lower `time` in the profile, or name another partition.")
    return Verdict("ok", "requests", f"{each.what}: {said}")


def nodes_verdict(slurm: Slurm, each: Asked, nodes: int, store: Path, patience: float) -> Verdict:
    """Whether that many nodes see the store, find each other and run the same; how fast they exchange numbers."""
    subject, who = "nodes", f"{each.what}, {nodes} node{'s' if nodes > 1 else ''}"
    try:
        slurm.would_begin([*what_is_asked(each.request, nodes, 1, on_gpu=each.on_gpu), *each.request.sbatch])
    except LaunchError as error:
        return Verdict("missing", subject, f"{who}: {problem_of(error).what}", "Ask for fewer with --nodes.")
    try:
        answer = tried_on_nodes(slurm, each, nodes, store, patience)
    except Waiting as waiting:
        hint = "Ask again with a larger --patience."
        return Verdict("warn", subject, f"{who}: were not tried, {waiting} after {patience:.0f} s", hint)
    except LaunchError as error:
        problem = problem_of(error)
        return Verdict("missing", subject, f"{who}: {problem.what}", problem.hint)
    blind = {host: seen for host, seen in zip(answer["hosts"], answer["seen"], strict=True) if seen < nodes}
    if blind:
        what = ", ".join(f"{host} sees the files of {seen} of {nodes} nodes" for host, seen in blind.items())
        hint = "Put the store on a filesystem that all nodes mount at the same place (--store, SLIPWAY_STORE)."
        return Verdict("missing", subject, f"{who}: {what} in {store}", hint)
    for name, values in answer["runs"].items():
        if len(set(values)) > 1:
            what = ", ".join(f"{value} on {host}" for host, value in zip(answer["hosts"], values, strict=True))
            hint = "Give every node the same checkout, environment and kind of device, or leave that node out."
            return Verdict("missing", subject, f"{who}: {name} is {what}", hint)
    what = f"{who}: {', '.join(sorted(answer['hosts']))}: all see the store; {answer['runs']['device'][0]}"
    if answer["bytes_per_second"]:
        what += f"; all-reduce over {answer['backend']} at {answer['bytes_per_second'] / 1e9:.2f} GB/s"
    return Verdict("ok", subject, what)


def problem_of(error: LaunchError) -> Problem:
    (first, *_) = error.problems
    return first if isinstance(first, Problem) else Problem("", first)


class Waiting(Exception):
    """The trial's job has not begun. Prints what it waits for."""


def tried_on_nodes(slurm: Slurm, each: Asked, nodes: int, store: Path, patience: float) -> dict[str, Any]:
    """What `launch.probe` found on the nodes. `store` must be there. Leaves no job and no file behind.

    Raises `Waiting` if the job has not begun in `patience` seconds, `LaunchError` if it ends without an answer.
    """
    require_printable({"the store's path": str(store)})
    folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=store))
    job_id = ""
    try:
        script = folder / SCRIPT
        script.write_text(trial_script(slurm, each, nodes, folder), encoding="utf-8")
        job_id = slurm.submit(script, ())
        begins_until = time.monotonic() + patience
        while found := slurm.queued().get(str(folder)):
            if found.state == "PENDING" and time.monotonic() > begins_until:
                raise Waiting(str(found))
            time.sleep(POLL_SECONDS)
        return answer_of(folder)
    finally:
        if job_id:
            with contextlib.suppress(LaunchError):
                slurm.cancel([job_id])
        shutil.rmtree(folder, ignore_errors=True)


def trial_script(slurm: Slurm, each: Asked, nodes: int, folder: Path) -> str:
    """A batch script that runs this module on the first of its nodes."""
    longest = each.request.time
    if longest is None or minutes(longest) > LONGEST_MINUTES:
        longest = str(LONGEST_MINUTES)
    short = each.request.model_copy(update={"time": longest})
    options = [
        "--job-name=slipway-doctor",
        f"--chdir={quoted(str(folder))}",
        f"--output={CONSOLE}",
        *what_is_asked(short, nodes, 1, on_gpu=each.on_gpu),
        "--no-requeue",
        *each.request.sbatch,
    ]
    command = [sys.executable, "-m", __name__, str(folder), str(nodes), "nccl" if each.on_gpu else "gloo"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", *preparation(slurm.profile)]
    return "\n".join([*lines, shlex.join(command), ""])


def answer_of(folder: Path) -> dict[str, Any]:
    """The answer of a trial whose job has ended. Raises `LaunchError` with the last words of the job if there is none."""
    until = time.monotonic() + SETTLING_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((folder / ANSWER).read_bytes()))
        time.sleep(POLL_SECONDS)
    try:
        lines = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        what = f"the job has ended, and left nothing in {folder.parent}: the node does not see the store"
        hint = "Put the store on a filesystem that all nodes mount at the same place (--store, SLIPWAY_STORE)."
        raise LaunchError(Problem(str(folder), what, hint)) from None
    said = [line.strip() for line in lines if "Error" in line or "error" in line] or [line.strip() for line in lines]
    what = f"the job ended without an answer: {' / '.join(said[:SAID_LINES]) or 'it printed nothing'}"
    hint = "Compare `setup`, `environment` and `interface` of the profile with what a job needs on these nodes."
    raise LaunchError(Problem(str(folder), what, hint))


def main(arguments: list[str]) -> None:
    """Becomes the command that runs the probe on all nodes of the allocation that this process stands in."""
    folder, nodes, backend = arguments
    command = across_nodes(int(nodes), 1, "slipway-doctor", ["launch.probe", "together", backend, folder])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
