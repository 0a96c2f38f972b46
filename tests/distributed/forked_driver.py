"""Runs jobs one after the other, each in processes of its own: `python forked_driver.py JOBS.json`.

They are forked from this one, so that they need not load torch again, which takes longer than training; and they may die.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pipeline.stage import World
from stages.lib.processes import joining
from tests.distributed import training_driver

LOADED_LATER = ("setuptools", "torch._inductor.compile_fx", "deepspeed", "stages.lib.on_policy.setup")
"""By a run, which would do so in each process anew."""


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    """The id of a process that runs its part of the job."""
    if process := os.fork():
        return process
    code = 1
    try:
        world = World(rank=rank, size=job["processes"], local_rank=rank)
        names = {"RANK": rank, "WORLD_SIZE": world.size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        training_driver.WORLD = world
        training_driver.run(job)
        joining.leave_processes()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> None:
    """Runs the job. Where one of its processes dies or fails the others are killed, as a launcher would.

    Raises `SystemExit` if it fails, or if it does not kill itself although it should.
    """
    port = joining.free_port()
    alive = {fork(job, rank, port) for rank in range(job["processes"])}
    codes: list[int] = []
    while alive and not any(codes):
        process, status = os.wait()
        alive.remove(process)
        codes.append(os.waitstatus_to_exitcode(status))
    time.sleep(0.1 if alive else 0)  # so that one that killed itself is told from those that fail because of it
    for process in alive:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            codes.append(os.waitstatus_to_exitcode(status))
        else:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    expected = {-signal.SIGKILL} if job["die"] else {0}
    if not expected & set(codes) or (not job["die"] and any(codes)):
        raise SystemExit(f"{job['work']}: die is {job['die']}, and its processes ended with {codes}")


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_bytes())
    for module in LOADED_LATER:
        importlib.import_module(module)
    gc.freeze()  # DeepSpeed asks for collections, which would look through all of this each time
    for job in jobs:
        started = time.monotonic()
        run(job)
        print(f"{time.monotonic() - started:.1f} seconds: {job['work']}", flush=True)
