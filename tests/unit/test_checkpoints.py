"""Only checkpoints that verify exist; old ones go only after a newer one verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.store.checkpoints import COMPLETE, Checkpoints, Newest
from pipeline.store.resumable import STATE


def save(checkpoints: Checkpoints, step: int, needs: int | None = None) -> Path:
    folder = checkpoints.path(step)
    (folder / "engine").mkdir(parents=True)
    if needs is not None:
        state = {"step": step, "world_size": 1, "zero_stage": 0, "needs": [needs]}
        (folder / STATE).write_text(json.dumps(state))
    (folder / "model.bin").write_bytes(bytes(range(100)))
    (folder / "engine" / "optimizer.bin").write_bytes(b"o" * step)
    checkpoints.complete(step)
    return folder


def truncate(folder: Path) -> None:
    (folder / "model.bin").write_bytes(bytes(range(99)))


def remove(folder: Path) -> None:
    (folder / "engine" / "optimizer.bin").unlink()


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.bin").read_bytes())
    data[50] ^= 1
    (folder / "model.bin").write_bytes(data)


def forget_the_list(folder: Path) -> None:
    (folder / COMPLETE).unlink()


def tear_the_list(folder: Path) -> None:
    (folder / COMPLETE).write_text('{"step": 20, "fi')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "model.bin has 99 bytes instead of 100"),
        (remove, "engine/optimizer.bin is missing"),
        (flip_a_bit, "model.bin has other content than when it was written"),
        (forget_the_list, "complete.json is missing: it was not written to the end"),
        (tear_the_list, "complete.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: object, sentence: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    damage(save(checkpoints, 20))  # type: ignore[operator]
    newest = checkpoints.newest()
    assert (newest.path, newest.step) == (checkpoints.path(10), 10)
    assert newest.passed_over == [f"checkpoint-20 is not resumed from: {sentence}"]


def test_a_file_that_was_added_is_no_damage(tmp_path: Path) -> None:
    """As a network file system, a desktop or an editor leaves them."""
    checkpoints = Checkpoints(tmp_path)
    folder = save(checkpoints, 20)
    for name in (".nfs0000", ".DS_Store", "model.bin~", "engine/notes"):
        (folder / name).touch()
    assert checkpoints.newest() == Newest(checkpoints.path(20), 20, [])


def test_rotation_keeps_the_newest_and_deletes_nothing_while_the_newest_does_not_verify(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step)
    flip_a_bit(checkpoints.path(3))
    checkpoints.rotate()
    assert checkpoints.steps() == [1, 2, 3]
    save(checkpoints, 4)
    checkpoints.rotate()
    assert checkpoints.steps() == [3, 4]


def test_rotation_counts_only_good_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step)
    truncate(checkpoints.path(2))
    checkpoints.rotate()
    assert checkpoints.steps() == [1, 3]


def test_rotation_spares_what_a_kept_checkpoint_needs(tmp_path: Path) -> None:
    """20 is the best until 50 is: 20 stays as long as 40, which needs it, could still be resumed from."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, needs in ((10, None), (20, None), (30, 20), (40, 20), (50, None)):
        save(checkpoints, step, needs)
        checkpoints.rotate()
    assert checkpoints.steps() == [20, 40, 50]
    save(checkpoints, 60, 50)
    checkpoints.rotate()
    assert checkpoints.steps() == [50, 60]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, forget_the_list])
def test_a_checkpoint_is_worth_nothing_without_the_one_that_it_needs(tmp_path: Path, damage: object) -> None:
    checkpoints = Checkpoints(tmp_path)
    damage(save(checkpoints, 20))  # type: ignore[operator]
    save(checkpoints, 30)
    save(checkpoints, 40, 20)
    newest = checkpoints.newest()
    assert newest.step == 30
    assert newest.passed_over[0].startswith("checkpoint-40 is not resumed from: it needs checkpoint-20: ")
    assert checkpoints.own_problems(40) == []


def test_what_did_not_verify_is_discarded_before_training_goes_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    truncate(save(checkpoints, 20))
    checkpoints.discard_after(checkpoints.newest().step)
    assert checkpoints.steps() == [10]


def test_no_room_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the next checkpoint needs 1000000.0 TB and .* are free. Make room"):
        Checkpoints(tmp_path / "checkpoints").require_room(10**18)
