"""Do all ranks of a job see each other and the same work folder? Asked through files, before anything is loaded.

Each rank writes `hello-<rank>` with a number drawn at random; rank 0 answers with `welcome`, which lists the numbers it
read; a rank is through when its own number stands there, and says so in `thanks-<rank>`. Leftovers of an earlier run do
no harm: an old `hello` or `welcome` holds numbers that nobody waits for, and rank 0 removes old `thanks` before it answers.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path

from pipeline.errors import LaunchError, Problem
from pipeline.stage import World
from pipeline.store.durable import read_json, write_json
from pipeline.store.work_folder import WorkFolder

POLL_SECONDS = 0.02


def read(path: Path) -> dict[str, str]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write(path: Path, value: dict[str, str]) -> None:
    """As a whole or not at all; what is written here is worthless once the machine has gone down."""
    write_json(path, value, survives_power_loss=False)


def meet(work: Path, world: World, place: str, timeout_seconds: float = 120.0) -> None:
    """Returns when every rank has read and written in `work`. Raises `LaunchError` naming the ranks that did not."""
    if world.size == 1:
        return
    folder = WorkFolder(work).meeting(place)
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        for leftover in folder.glob("thanks-*"):
            leftover.unlink(missing_ok=True)
    token = secrets.token_hex(8)
    write(folder / f"hello-{world.rank}", {"token": token, "host": socket.gethostname()})
    deadline = time.monotonic() + timeout_seconds
    missing: list[int] = []
    while time.monotonic() < deadline:
        if world.is_main:
            hellos = {str(rank): read(folder / f"hello-{rank}").get("token", "") for rank in range(world.size)}
            if read(folder / "welcome") != hellos:
                write(folder / "welcome", hellos)
            thanks = {str(rank): read(folder / f"thanks-{rank}").get("token", "") for rank in range(1, world.size)}
            missing = [int(rank) for rank, number in thanks.items() if not number or number != hellos[rank]]
            if not missing and all(hellos.values()):
                with contextlib.suppress(OSError):
                    (folder / "welcome").unlink()
                return
        elif read(folder / "welcome").get(str(world.rank)) == token:
            write(folder / f"thanks-{world.rank}", {"token": token})
            return
        time.sleep(POLL_SECONDS)
    waited = f"after {timeout_seconds:.0f} s"
    hint = "Are the store and the checkout on a filesystem that all nodes share, and did every process start?"
    who = f"rank {world.rank} on {socket.gethostname()}"
    if world.is_main:
        raise LaunchError(Problem(str(folder), f"{who} saw no sign of ranks {missing} {waited}", hint))
    raise LaunchError(Problem(str(folder), f"{who} got no answer from rank 0 {waited}", hint))
