"""What says that something is whole appears when all of that is on the disk, and is itself on the disk afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.store.artifact import Facts
from pipeline.store.checkpoints import COMPLETE, Checkpoints
from pipeline.store.store import Store
from tests.unit.test_store import job


class Flushes:
    """What was flushed to the disk before and after `proof` was there. Known by inodes, which renaming does not change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, proof: Path) -> None:
        self.before: set[int] = set()
        self.after: set[int] = set()
        flush = os.fsync

        def watched(descriptor: int) -> None:
            flush(descriptor)
            (self.after if proof.exists() else self.before).add(os.fstat(descriptor).st_ino)

        monkeypatch.setattr(os, "fsync", watched)


def inodes(folder: Path) -> dict[str, int]:
    """Relative path -> inode of every file below the folder."""
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_on_the_disk_before_its_list_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder = checkpoints.path(3)
    (folder / "engine").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "engine" / "optimizer.bin").write_bytes(b"moments")
    flushes = Flushes(monkeypatch, folder / COMPLETE)
    checkpoints.complete(3)
    written = inodes(folder)
    assert set(written) == {"model.bin", "engine/optimizer.bin", COMPLETE}
    assert {name for name, inode in written.items() if inode not in flushes.before} == set()
    assert folder.stat().st_ino in flushes.after, "or the list is there and the folder does not know it"


def test_an_artifact_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "runs")
    made = job(store, "first", "a" * 64)
    store.begin(made)
    out = made.work_folder / "out"
    (out / "below").mkdir(parents=True)
    (out / "text.txt").write_text("first")
    (out / "below" / "more.txt").write_text("second")
    target = store.artifact_folder(made.artifact_id)
    flushes = Flushes(monkeypatch, target)
    store.commit(made, {}, Facts(), wall_seconds=1.0, device="cpu", world_size=1)
    written = inodes(target)
    assert set(written) == {"text.txt", "below/more.txt", "manifest.json"}
    assert {name for name, inode in written.items() if inode not in flushes.before} == set()
    assert {target.stat().st_ino, (target / "below").stat().st_ino} <= flushes.before
    assert target.parent.stat().st_ino in flushes.after, "or the folder has a new name and nobody knows it"
