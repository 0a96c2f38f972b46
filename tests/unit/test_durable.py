"""What must survive a power loss is flushed before it counts, and is hashed once."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.store import artifact
from pipeline.store import checkpoints as checkpoints_module
from pipeline.store.artifact import MANIFEST, Facts
from pipeline.store.checkpoints import COMPLETE, Checkpoints
from pipeline.store.durable import make_folder, replacing, replacing_folder, write_json
from pipeline.store.store import Store
from tests.unit.test_store import A, job


@dataclass
class Flushes:
    """Every fsync of this process: what was flushed, how it looked then, and whether the mark stood already."""

    mark: Path | None = None
    seen: list[tuple[int, int | frozenset[str], bool]] = field(default_factory=list)
    """(inode, size of the file or names in the folder, whether the mark was there)."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        flush = os.fsync

        def watched(descriptor: int) -> None:
            flush(descriptor)
            status = os.fstat(descriptor)
            is_folder = stat.S_ISDIR(status.st_mode)
            looks = frozenset(os.listdir(descriptor)) if is_folder else status.st_size
            self.seen.append((status.st_ino, looks, self.mark is not None and self.mark.exists()))

        monkeypatch.setattr(os, "fsync", watched)

    def of_file(self, path: Path, *, marked: bool) -> bool:
        """Whether the file was flushed with all its content while the mark stood or did not."""
        status = path.stat()
        return (status.st_ino, status.st_size, marked) in self.seen

    def of_name(self, folder: Path, name: str, *, marked: bool) -> bool:
        """Whether the folder was flushed while it held this name."""
        inode = folder.stat().st_ino
        return any(
            number == inode and isinstance(looks, frozenset) and name in looks and was_marked == marked
            for number, looks, was_marked in self.seen
        )


def not_flushed(flushes: Flushes, root: Path, mark: Path) -> list[str]:
    """What was not safe before the mark appeared, and what of the mark was not afterwards.

    All files and folders below the mark's folder, and all folders between it and `root`, which was there before.
    """
    missing = []
    for path in mark.parent.rglob("*"):
        if path.is_file() and not flushes.of_file(path, marked=False):
            missing.append(f"content of {path.relative_to(root)}")
        if path != mark and not flushes.of_name(path.parent, path.name, marked=False):
            missing.append(f"name of {path.relative_to(root)}")
    for path in [mark.parent, *mark.parent.parents]:
        if path == root:
            break
        if path != mark.parent and not flushes.of_name(path.parent, path.name, marked=False):
            missing.append(f"name of {path.relative_to(root)}")
    return missing


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> Flushes:
    flushes = Flushes()
    flushes.install(monkeypatch)
    return flushes


def test_all_of_a_checkpoint_and_every_folder_on_the_way_is_flushed_before_its_list(
    tmp_path: Path, flushes: Flushes
) -> None:
    store = Store(tmp_path / "deep" / "below" / "runs")
    store.begin(job(store, "train", A))
    checkpoints = store.checkpoints("train", A)
    checkpoints.folder.mkdir()
    folder = checkpoints.path(7)
    (folder / "engine" / "rank").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * 100)
    (folder / "engine" / "rank" / "optimizer.bin").write_bytes(b"o" * 50)
    flushes.mark = folder / COMPLETE
    checkpoints.complete(7)
    assert not_flushed(flushes, tmp_path, flushes.mark) == []
    assert flushes.of_name(checkpoints.folder, folder.name, marked=False)
    assert flushes.of_name(folder, COMPLETE, marked=True)
    assert not checkpoints.problems(7)


def test_all_of_an_artifact_and_every_folder_on_the_way_is_flushed_before_it_appears(
    tmp_path: Path, flushes: Flushes
) -> None:
    store = Store(tmp_path / "deep" / "below" / "runs")
    the_job = job(store, "make", A)
    store.begin(the_job)
    (the_job.files.out / "parts").mkdir(parents=True)
    (the_job.files.out / "model.bin").write_bytes(b"m" * 100)
    (the_job.files.out / "parts" / "rows.jsonl").write_bytes(b"r" * 50)
    flushes.mark = store.artifact_folder(A) / MANIFEST
    store.commit(the_job, {}, Facts(), wall_seconds=1.0, device="cpu", world_size=1)
    assert not_flushed(flushes, tmp_path, flushes.mark) == []
    assert flushes.of_name(flushes.mark.parent, MANIFEST, marked=False)
    assert flushes.of_name(store.artifacts, A, marked=True)


def test_a_file_and_a_folder_that_are_replaced_are_flushed_before_and_after(tmp_path: Path, flushes: Flushes) -> None:
    flushes.mark = tmp_path / "file.json"
    write_json(flushes.mark, {"a": 1})
    assert flushes.of_file(flushes.mark, marked=False)
    assert flushes.of_name(tmp_path, "file.json", marked=True)
    flushes.mark = tmp_path / "above" / "folder"
    with replacing_folder(flushes.mark) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "rows").write_bytes(b"rows")
    assert flushes.of_file(flushes.mark / "below" / "rows", marked=False)
    assert flushes.of_name(flushes.mark / "below", "rows", marked=False)
    assert flushes.of_name(flushes.mark, "below", marked=False)
    assert flushes.of_name(tmp_path, "above", marked=False)
    assert flushes.of_name(flushes.mark.parent, "folder", marked=True)


def test_what_is_worthless_after_a_power_loss_costs_no_flush(tmp_path: Path, flushes: Flushes) -> None:
    write_json(tmp_path / "file.json", {"a": 1}, survives_power_loss=False)
    make_folder(tmp_path)
    assert flushes.seen == []


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows").write_text("old")

    def fail_within_the_file() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise ZeroDivisionError

    def fail_within_the_folder() -> None:
        with replacing_folder(tmp_path / "folder") as folder:
            (folder / "rows").write_text("half")
            raise ZeroDivisionError

    for fail in (fail_within_the_file, fail_within_the_folder):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "rows").read_text() == "old"


def test_a_file_of_a_checkpoint_is_hashed_once_per_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three saves of two files each: 6, with the rotation after each. One more process that rotates hashes the 2 newest."""
    hashed = []
    digest_file = artifact.digest_file

    def watched(path: Path | str) -> str:
        hashed.append(path)
        return digest_file(path)

    monkeypatch.setattr(artifact, "digest_file", watched)
    monkeypatch.setattr(checkpoints_module, "digest_file", watched)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.path(step).mkdir()
        (checkpoints.path(step) / "model.bin").write_bytes(b"m" * step)
        (checkpoints.path(step) / "optimizer.bin").write_bytes(b"o" * step)
        checkpoints.complete(step)
        checkpoints.rotate()
    assert checkpoints.steps() == [2, 3]
    assert len(hashed) == 6
    Checkpoints(tmp_path, keep=1).rotate()
    assert checkpoints.steps() == [3]
    assert len(hashed) == 8
