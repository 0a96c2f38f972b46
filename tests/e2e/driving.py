"""Driving the real command from outside: running it, killing it at a chosen moment, comparing what it made."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store.artifact import Manifest, read_manifest
from pipeline.store.checkpoints import COMPLETE, Checkpoints
from pipeline.store.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "e2e" / "tiny.yaml"
DEADLINE_SECONDS = 240.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline", *map(str, arguments)]


def slipway(*arguments: object, timeout: float = DEADLINE_SECONDS) -> subprocess.CompletedProcess[str]:
    """The finished command, with its output."""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def processes_about(text: str) -> list[int]:
    """The processes whose command line names `text`, other than ours."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def kill_when(moment: Callable[[], bool], store: Path, *arguments: object) -> None:
    """Runs the command and kills it with all its processes, with SIGKILL, as soon as `moment()` holds."""
    process = subprocess.Popen(
        command(*arguments, "--store", store), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        wait_for(moment, process, store)
    finally:
        for pid in [*processes_about(str(store)), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        while processes_about(str(store)):
            time.sleep(0.01)


def wait_for(moment: Callable[[], bool], process: subprocess.Popen[str], store: Path) -> None:
    """Returns as soon as `moment()` holds, which may be for some milliseconds only.

    While the process loads its libraries, and no journal grows, it looks seldom: that would take the time of the loading.
    """
    started = time.time()
    deadline = time.monotonic() + DEADLINE_SECONDS
    training = False
    while not moment():
        if process.poll() is not None:
            raise AssertionError(f"ended before the moment came:\n{process.stdout.read() if process.stdout else ''}")
        assert time.monotonic() < deadline, "the moment never came"
        training = training or any(path.stat().st_mtime >= started for path in store.glob("work/*/journal.jsonl"))
        time.sleep(0.001 if training else 0.05)


def work_folder(store: Path, step: str) -> Path:
    folders = list((store / "work").glob(f"{step}-????????"))
    return folders[0] if folders else store / "work" / f"{step}-none"


def at_step(store: Path, step: str, number: int) -> Callable[[], bool]:
    """Whether the step's journal has come to training step `number`."""

    def reached() -> bool:
        return any(event["step"] >= number for event in training_steps(store, step))

    return reached


def writing_checkpoint(store: Path, step: str, number: int) -> Callable[[], bool]:
    """Whether the checkpoint of training step `number` is being written: its folder has files but no list."""

    def reached() -> bool:
        folder = work_folder(store, step) / "checkpoints" / f"checkpoint-{number}"
        try:
            return any(folder.iterdir()) and not (folder / COMPLETE).exists()
        except OSError:
            return False

    return reached


def checkpoints(store: Path, step: str) -> Checkpoints:
    return Checkpoints(work_folder(store, step) / "checkpoints")


def store_without(reference: Path, step: str, folder: Path) -> Path:
    """A store that holds all that the reference store holds, but for what the step made."""
    missing = manifest_of(reference, step).artifact_id
    (folder / "artifacts").mkdir(parents=True)
    for artifact in (reference / "artifacts").iterdir():
        if artifact.name != missing:
            (folder / "artifacts" / artifact.name).symlink_to(artifact)
    shutil.copytree(reference / "recipes", folder / "recipes")
    return folder


def manifest_of(store: Path, step: str) -> Manifest:
    for folder in (store / "artifacts").iterdir():
        manifest = read_manifest(folder)
        if manifest.step == step:
            return manifest
    raise AssertionError(f"{store} holds nothing that {step} made")


def weights(store: Path, step: str) -> dict[str, str]:
    """Name -> digest of the weight files that the step made."""
    files = manifest_of(store, step).files
    found = {name: entry.sha256 for name, entry in files.items() if name.endswith(".safetensors")}
    assert found, f"{step} made no weights: {sorted(files)}"
    return found


def assert_two_kills_change_nothing(reference: Path, folder: Path, step: str) -> None:
    """Kills the step of the tiny recipe in training step 8, then while a checkpoint is written, and lets it end.

    Weights and losses must be those of the reference store, where it was never killed.
    """
    store = store_without(reference, step, folder)
    run = ("run", TINY, "--only", step)
    kill_when(at_step(store, step, 8), store, *run)
    assert checkpoints(store, step).newest().step >= 6
    assert [event["step"] for event in training_steps(store, step)][-1] < 24

    # A checkpoint is written in some milliseconds: on a busy machine the kill may come when it is whole. The next one, then.
    for _ in range(2):
        target = checkpoints(store, step).newest().step + 6
        kill_when(writing_checkpoint(store, step, target), store, *run)
        if checkpoints(store, step).newest().step == target - 6:
            break
    assert checkpoints(store, step).newest().step == target - 6

    ended = slipway(*run, "--store", store)
    assert ended.returncode == 0, ended.stdout
    assert f"checkpoint {target - 6} of 24, verified" in ended.stdout
    assert weights(store, step) == weights(reference, step)
    losses, expected = ([event["loss"] for event in training_steps(each, step)] for each in (store, reference))
    assert len(losses) == 24
    assert losses == expected


def training_steps(store: Path, step: str) -> list[dict[str, Any]]:
    """What the step's journal says of its training steps."""
    return [event for event in read_journal(work_folder(store, step) / "journal.jsonl") if event["event"] == "step"]
