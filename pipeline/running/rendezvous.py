"""Do all ranks of a job see each other and the same work folder? Asked through files, before anything is loaded.

Each rank writes `hello-<rank>` with a number drawn at random; rank 0 answers with `welcome`, which lists the numbers it
read; a rank whose own number stands there says so in `thanks-<rank>`. Once all have, `welcome` holds the verdict as well, and
nobody is through before that. Leftovers of an earlier run do no harm: an old `hello` or `welcome` holds numbers that nobody
waits for, and rank 0 removes old `thanks` before it answers.

A `hello` also says what its rank runs: code, libraries, kind of device, job. Where these differ, the verdict says so, and all
ranks end with that sentence.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import LaunchError, Problem
from pipeline.stage import World
from pipeline.store.durable import read_json, write_json
from pipeline.store.work_folder import WorkFolder

POLL_SECONDS = 0.02
VERDICT = "verdict"
"""What `welcome` holds beside the numbers once all are there: why the ranks may not go on together; empty if they may."""


def read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write(path: Path, value: Mapping[str, Any]) -> None:
    """As a whole or not at all; what is written here is worthless once the machine has gone down."""
    write_json(path, value, survives_power_loss=False)


def odd_ones(hellos: Mapping[str, Mapping[str, Any]]) -> str:
    """What ranks run that most others do not, in a sentence; empty if all run the same. `hellos`: rank -> what it said."""
    said = []
    for name in sorted({name for hello in hellos.values() for name in hello.get("runs", {})}):
        found = {rank: str(hello.get("runs", {}).get(name, "none")) for rank, hello in hellos.items()}
        # Of equally many, that of rank 0.
        usual = max(Counter(found.values()).items(), key=lambda each: (each[1], each[0] == found["0"]))[0]
        odd = [rank for rank, value in found.items() if value != usual]
        said += [
            f"{name} is {found[rank]} for rank {rank} on {hellos[rank].get('host')}, and {usual} for most"
            for rank in odd
        ]
    return "; ".join(said[:5])


def meet(
    work: Path, world: World, place: str, timeout_seconds: float = 120.0, runs: Mapping[str, str] | None = None
) -> None:
    """Returns when every rank has read and written in `work`, and all of them say the same of what they run.

    Raises `LaunchError` naming the ranks that did not, or that differ.
    """
    if world.size == 1:
        return
    folder = WorkFolder(work).meeting(place)
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        for leftover in folder.glob("thanks-*"):
            leftover.unlink(missing_ok=True)
    token = secrets.token_hex(8)
    write(folder / f"hello-{world.rank}", {"token": token, "host": socket.gethostname(), "runs": dict(runs or {})})
    deadline = time.monotonic() + timeout_seconds
    missing: list[int] = []
    thanked = False
    while time.monotonic() < deadline:
        if world.is_main:
            found = {str(rank): read(folder / f"hello-{rank}") for rank in range(world.size)}
            numbers = {rank: hello.get("token", "") for rank, hello in found.items()}
            thanks = {str(rank): read(folder / f"thanks-{rank}").get("token", "") for rank in range(1, world.size)}
            missing = [int(rank) for rank, number in thanks.items() if not number or number != numbers[rank]]
            answer = numbers if missing else {**numbers, VERDICT: odd_ones(found)}
            if read(folder / "welcome") != answer:
                write(folder / "welcome", answer)
            if not missing:
                require_same(work, answer[VERDICT])
                return
        elif (welcome := read(folder / "welcome")).get(str(world.rank)) == token:
            if not thanked:
                write(folder / f"thanks-{world.rank}", {"token": token})
                thanked = True
            if VERDICT in welcome:
                require_same(work, welcome[VERDICT])
                return
        time.sleep(POLL_SECONDS)
    waited = f"after {timeout_seconds:.0f} s"
    hint = "Are the store and the checkout on a filesystem that all nodes share, and did every process start?"
    who = f"rank {world.rank} on {socket.gethostname()}"
    if world.is_main:
        raise LaunchError(Problem(str(folder), f"{who} saw no sign of ranks {missing} {waited}", hint))
    raise LaunchError(Problem(str(folder), f"{who} got no answer from rank 0 {waited}", hint))


def require_same(work: Path, odd: str) -> None:
    """Raises `LaunchError` where ranks run different things."""
    if odd:
        hint = "Give every node the same checkout, environment and kind of device, or leave that node out."
        raise LaunchError(Problem(str(work), f"the ranks do not run the same: {odd}", hint))
