"""Killed at any instant and started again, a stage ends with the same weights as one that was never killed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.journal import read_journal
from tests.e2e.driving import (
    TINY,
    at_step,
    checkpoints,
    kill_when,
    slipway,
    store_without,
    weights,
    work_folder,
    writing_checkpoint,
)

pytestmark = pytest.mark.slow

TRAINING_STEPS = ["base", "chat", "reward", "aligned", "student", "encoder", "topics", "names", "answers"]
"""Each stage that trains: pretrain (causal and masked), sft, reward, dpo, distill, classify, extract, answer."""


@pytest.mark.parametrize("step", TRAINING_STEPS)
def test_killed_in_a_step_and_in_a_checkpoint_write_it_ends_with_the_same_weights(
    reference_store: Path, tmp_path: Path, step: str
) -> None:
    store = store_without(reference_store, step, tmp_path / "store")
    run = ("run", TINY, "--only", step)
    kill_when(at_step(store, step, 8), store, *run)
    assert checkpoints(store, step).newest().step >= 6
    steps = [
        event["step"] for event in read_journal(work_folder(store, step) / "journal.jsonl") if event["event"] == "step"
    ]
    assert steps[-1] < 24

    target = checkpoints(store, step).newest().step + 6
    kill_when(writing_checkpoint(store, step, target), store, *run)
    assert checkpoints(store, step).newest().step == target - 6

    ended = slipway(*run, "--store", store)
    assert ended.returncode == 0, ended.stdout
    assert f"checkpoint {target - 6} of 24, verified" in ended.stdout
    assert weights(store, step) == weights(reference_store, step)
    losses = {
        where: [
            event["loss"]
            for event in read_journal(work_folder(where, step) / "journal.jsonl")
            if event["event"] == "step"
        ]
        for where in (store, reference_store)
    }
    assert len(losses[store]) == 24
    assert losses[store] == losses[reference_store]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "bytes instead of"),
        (Path.unlink, "is missing"),
        (flip_a_bit, "has other content than when it was written"),
    ],
    ids=["truncated", "missing", "bit flipped"],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_log_says_so(
    reference_store: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    step = "topics"
    store = store_without(reference_store, step, tmp_path / "store")
    run = ("run", TINY, "--only", step)
    kill_when(lambda: checkpoints(store, step).newest(hashes=False).step >= 12, store, *run)
    saved = checkpoints(store, step)
    newest = saved.newest()
    assert newest.step in (12, 18)
    listed = json.loads((saved.path(newest.step) / "complete.json").read_text())["files"]
    largest = max(listed, key=lambda name: listed[name]["size"])
    damage(saved.path(newest.step) / largest)

    ended = slipway(*run, "--store", store)
    assert ended.returncode == 0, ended.stdout
    said = rf"checkpoint-{newest.step} is not resumed from: {re.escape(largest)} .*{sentence}"
    assert re.search(said, ended.stdout), ended.stdout
    assert f"checkpoint {newest.step - 6} of 24, verified" in ended.stdout
    assert weights(store, step) == weights(reference_store, step)
