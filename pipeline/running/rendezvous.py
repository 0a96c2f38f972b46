"""Do all ranks of a job see each other and the same work folder? Asked through files, before anything is loaded.

Each rank writes `hello-<rank>` with a number drawn at random; rank 0 answers with `welcome`, which lists the numbers it
read; a rank is through when its own number stands there, and says so in `thanks-<rank>`. Leftovers of an earlier run do
no harm: an old `hello` or `welcome` holds numbers that nobody waits for, and rank 0 removes old `thanks` before it answers.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from pathlib import Path

from pipeline.errors import LaunchError, Problem
from pipeline.stage import World
from pipeline.store.numbers import json_text

POLL_SECONDS = 0.02


def read_json(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, str], token: str) -> None:
    temporary = path.with_name(f"{path.name}.{token}")
    temporary.write_text(json_text(value, path.name), encoding="utf-8")
    temporary.replace(path)


def meet(work: Path, world: World, place: str, timeout_seconds: float = 120.0) -> None:
    """Returns when every rank has read and written in `work`. Raises `LaunchError` naming the ranks that did not."""
    if world.size == 1:
        return
    folder = work / "rendezvous" / place
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        for leftover in folder.glob("thanks-*"):
            leftover.unlink(missing_ok=True)
    token = secrets.token_hex(8)
    write_json(folder / f"hello-{world.rank}", {"token": token, "host": socket.gethostname()}, token)
    deadline = time.monotonic() + timeout_seconds
    missing: list[int] = []
    while time.monotonic() < deadline:
        if world.is_main:
            hellos = {str(rank): read_json(folder / f"hello-{rank}").get("token", "") for rank in range(world.size)}
            if read_json(folder / "welcome") != hellos:
                write_json(folder / "welcome", hellos, token)
            thanks = {str(rank): read_json(folder / f"thanks-{rank}").get("token", "") for rank in range(1, world.size)}
            missing = [int(rank) for rank, number in thanks.items() if not number or number != hellos[rank]]
            if not missing and all(hellos.values()):
                with contextlib.suppress(OSError):
                    (folder / "welcome").unlink()
                return
        elif read_json(folder / "welcome").get(str(world.rank)) == token:
            write_json(folder / f"thanks-{world.rank}", {"token": token}, token)
            return
        time.sleep(POLL_SECONDS)
    waited = f"after {timeout_seconds:.0f} s"
    hint = "Are the store and the checkout on a filesystem that all nodes share, and did every process start?"
    who = f"rank {world.rank} on {socket.gethostname()}"
    if world.is_main:
        raise LaunchError(Problem(str(folder), f"{who} saw no sign of ranks {missing} {waited}", hint))
    raise LaunchError(Problem(str(folder), f"{who} got no answer from rank 0 {waited}", hint))
