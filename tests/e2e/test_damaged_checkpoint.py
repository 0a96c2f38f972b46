"""A checkpoint that is not what was written is not resumed from: the one before it is, with the same weights in the end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.driving import TINY, checkpoints, kill_when, slipway, store_without, weights

pytestmark = pytest.mark.slow

STEP = "topics"
RUN = ("run", TINY, "--only", STEP)


@pytest.fixture(scope="module")
def killed_store(reference_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the step was killed after its second checkpoint or its third."""
    store = store_without(reference_store, STEP, tmp_path_factory.mktemp("killed") / "store")
    kill_when(lambda: checkpoints(store, STEP).newest(hashes=False).step >= 12, store, *RUN)
    return store


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
def test_it_is_passed_over_and_the_log_says_so(
    killed_store: Path, reference_store: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    store = shutil.copytree(killed_store, tmp_path / "store", symlinks=True)
    saved = checkpoints(store, STEP)
    newest = saved.newest()
    assert newest.step in (12, 18)
    listed = json.loads((saved.path(newest.step) / "complete.json").read_text())["files"]
    largest = max(listed, key=lambda name: listed[name]["size"])
    damage(saved.path(newest.step) / largest)

    ended = slipway(*RUN, "--store", store)
    assert ended.returncode == 0, ended.stdout
    said = rf"checkpoint-{newest.step} is not resumed from: {re.escape(largest)} .*{sentence}"
    assert re.search(said, ended.stdout), ended.stdout
    assert f"checkpoint {newest.step - 6} of 24, verified" in ended.stdout
    assert weights(store, STEP) == weights(reference_store, STEP)
