"""A step shown on trackers: one curve without a step twice or missing, however it was killed, and the same artifact."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.store.journal import read_journal
from tests.e2e.driving import (
    ROOT,
    TINY,
    at_step,
    command,
    kill_when,
    manifest_of,
    processes_about,
    slipway,
    store_without,
    training_steps,
    weights,
    work_folder,
)
from tests.e2e.tracked import Curve, tensorboard_curves, wandb_curves, wandb_records
from trackers import TRACKERS

for library in ("tensorboard", *(tracker.library for tracker in TRACKERS.values())):
    pytest.importorskip(library, reason=f"needs {library}, of the extra `trackers`")
pytestmark = pytest.mark.slow

BOTH = ("--set", "tracking={tensorboard: {}, wandb: {mode: offline, project: tiny}}")


@pytest.fixture(autouse=True)
def nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


def folder_of(store: Path, tracker: str, step: str) -> Path:
    (found,) = (store / "tracking" / tracker / "tiny").glob(f"{step}-*")
    return found


def journal_curve(store: Path, step: str, event: str, field: str) -> Curve:
    return [
        (line["step"], line[field])
        for line in read_journal(work_folder(store, step) / "journal.jsonl")
        if line["event"] == event
    ]


def assert_same(found: Curve, expected: Curve) -> None:
    """The same steps in the same order; values as float32 holds them, as TensorBoard does."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_killed_and_resumed_it_is_one_curve(reference_store: Path, tmp_path: Path) -> None:
    """Killed after a checkpoint and again before the next: on both trackers are the journal's steps, each once."""
    store = store_without(reference_store, "base", tmp_path / "store")
    run = ("run", TINY, "--only", "base", *BOTH)
    for number in (9, 14):
        kill_when(at_step(store, "base", number), store, *run)
    ids = json.loads((work_folder(store, "base") / "tracking-wandb.json").read_text())["id"]
    ended = slipway(*run, "--store", store)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [event["step"] for event in training_steps(store, "base")] == list(range(1, 25))

    for curves in (
        tensorboard_curves(folder_of(store, "tensorboard", "base")),
        wandb_curves(folder_of(store, "wandb", "base")),
    ):
        for field in ("loss", "learning_rate", "gradient_norm"):
            assert_same(curves[f"train/{field}"], journal_curve(store, "base", "step", field))
        assert_same(curves["heldout/loss"], journal_curve(store, "base", "heldout", "heldout_loss"))
    records = wandb_records(folder_of(store, "wandb", "base"))
    begun, *_ = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (begun.run_id, begun.run_group, begun.display_name, begun.job_type) == (ids, "tiny", "base", "pretrain")
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["ended"] == "finished"
    assert summary["made/heldout_perplexity"] == manifest_of(store, "base").metrics["heldout_perplexity"]
    assert weights(store, "base") == weights(reference_store, "base")
    assert processes_about(str(store)) == []


def test_a_tracker_that_is_down_is_said_and_changes_nothing(
    reference_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens where both servers should be: wandb keeps all in files, mlflow is missed, the weights are the same."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        place = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", place)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        store = store_without(reference_store, "base", tmp_path / "store")
        said = {"wandb": {}, "mlflow": {"uri": place}}
        ended = slipway("run", TINY, "--only", "base", "--set", f"tracking={json.dumps(said)}", "--store", store)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = folder_of(store, "wandb", "base")
    assert f"tracker wandb stays offline (127.0.0.1:{taken_port(place)}: Connection refused)" in ended.stdout
    assert f"`wandb sync {folder}/wandb/offline-run-*` sends it" in ended.stdout
    assert f"tracker mlflow: 127.0.0.1:{taken_port(place)}: Connection refused. It is tried again" in ended.stdout
    assert wandb_curves(folder)["train/loss"] == journal_curve(store, "base", "step", "loss")
    assert weights(store, "base") == weights(reference_store, "base")
    assert "0" * 40 not in "".join(path.read_text() for path in work_folder(store, "base").glob("*.js*"))


def taken_port(place: str) -> str:
    return place.rpartition(":")[2]


def test_the_environment_switches_wandb_on_and_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data stage is shown as well: the sentences that it says, how far it is, its figures."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = ("run", TINY, "--until", "text_rows", "--store")
    assert slipway(*run, tmp_path / "on").returncode == 0
    records = wandb_records(folder_of(tmp_path / "on", "wandb", "text_rows"))
    notes = [record.run.notes for record in records if record.WhichOneof("record_type") == "run"]
    assert "kept 60 of 262 rows" in notes[-1]
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["made/rows_kept"] == 60

    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert slipway(*run, tmp_path / "off", *BOTH).returncode == 0
    assert [path.name for path in (tmp_path / "off" / "tracking").iterdir()] == ["tensorboard"]


def test_a_tracker_that_hangs_is_left_behind(reference_store: Path, tmp_path: Path) -> None:
    """Held by SIGSTOP from the first step to the end, it costs the waiting for it, and is killed then."""
    store = store_without(reference_store, "base", tmp_path / "store")
    process = subprocess.Popen(
        command("run", TINY, "--only", "base", "--set", "tracking={tensorboard: {}}", "--store", store),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    moment = at_step(store, "base", 2)
    while not moment():
        assert process.poll() is None
        time.sleep(0.05)
    (follower,) = [pid for pid in processes_about(str(store)) if is_follower(pid)]
    os.kill(follower, signal.SIGSTOP)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert weights(store, "base") == weights(reference_store, "base")
    assert processes_about(str(store)) == []


def is_follower(pid: int) -> bool:
    return b"trackers" in (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
