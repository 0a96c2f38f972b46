"""The store: commits, names, lineage and verification."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.command import reports, states
from pipeline.errors import ArtifactError, DataError
from pipeline.settings.resources import Resources
from pipeline.store.artifact import Facts, FileEntry, Kind
from pipeline.store.job import Job, read_job
from pipeline.store.store import Store


def job(store: Store, step: str, artifact_id: str, inputs: dict[str, str] | None = None) -> Job:
    return Job(
        recipe="demo", step=step, kind="write", stage_version=1, artifact_id=artifact_id, artifact_kind=Kind.TEXT.value,
        params={"count": 1}, inputs={}, input_ids=inputs or {}, source_digests={"file": "sha256:ab /data/a.txt"}, seed=1,
        resources=Resources(), store=str(store.folder), work=str(store.work_folder(step, artifact_id)),
    )  # fmt: skip


def make(store: Store, step: str, artifact_id: str, inputs: dict[str, str] | None = None) -> None:
    the_job = job(store, step, artifact_id, inputs)
    store.begin(the_job)
    out = the_job.work_folder / "out"
    out.mkdir()
    (out / "text.txt").write_text(step)
    store.commit(the_job, {"loss": 0.5}, Facts(), wall_seconds=1.5, device="cpu", world_size=2)


A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    make(store, "first", A)
    make(store, "second", B, {"data": A})
    make(store, "third", C, {"data": A})
    store.record(
        "demo",
        {
            "path": "demo.yaml",
            "overrides": [],
            "steps": {"second": {"artifact_id": B, "identity": {}, "kind": "write"}},
        },
    )
    return store


def test_a_commit_lists_every_file_with_size_and_digest(store: Store) -> None:
    manifest = store.find(A)
    assert manifest is not None
    # SHA-256 of the five bytes "first".
    digest = "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    assert manifest.files == {"text.txt": FileEntry(size=5, sha256=digest)}
    assert (manifest.world_size, manifest.wall_seconds, manifest.metrics) == (2, 1.5, {"loss": 0.5})
    assert not (store.work_folder("first", A) / "out").exists()


def test_nothing_is_committed_with_a_metric_that_is_no_number(store: Store) -> None:
    the_job = job(store, "fourth", "d" * 64)
    store.begin(the_job)
    (the_job.work_folder / "out").mkdir()
    with pytest.raises(DataError, match=r"fourth: heldout_loss is nan\. Nothing was published"):
        store.commit(the_job, {"heldout_loss": float("nan")}, Facts(), wall_seconds=1.0, device="cpu", world_size=1)
    assert store.find("d" * 64) is None


def test_a_job_reads_back_as_it_was_written(store: Store) -> None:
    assert read_job(store.work_folder("second", B)) == job(store, "second", B, {"data": A})


@pytest.mark.parametrize("name", ["b" * 64, "bbbb", "second", "demo/second"])
def test_an_artifact_is_found_by_id_digits_and_step(store: Store, name: str) -> None:
    assert store.resolve(name) == (B, store.artifact_folder(B))
    assert store.resolve(str(store.artifact_folder(B))) == (B, store.artifact_folder(B))


def test_an_unknown_name_says_what_to_do(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no artifact or step of this name"):
        store.resolve("nothing")


def test_verify_names_what_differs(store: Store) -> None:
    assert reports.verify_lines(store, "second")[1]
    (store.artifact_folder(B) / "text.txt").write_text("Second")
    lines, sound = reports.verify_lines(store, "second")
    assert not sound
    assert lines[0].endswith("second: text.txt has other content than when it was written")


def test_lineage_goes_down_to_source_digests(store: Store) -> None:
    assert reports.lineage_lines(store, "second") == [
        "second  write v1  bbbbbbbbbbbb",
        "|-- data: first  write v1  aaaaaaaaaaaa",
        "|   `-- file: sha256:ab /data/a.txt",
        "`-- file: sha256:ab /data/a.txt",
    ]


def test_show_prints_the_manifest(store: Store) -> None:
    text = "\n".join(reports.show_lines(store, "second"))
    assert "second: text made by write version 1" in text
    assert "loss  0.5" in text


def test_lineage_status_and_names_survive_a_damaged_manifest(store: Store) -> None:
    (store.artifact_folder(A) / "manifest.json").write_text('{"artifact_id": 3')
    drawn = reports.lineage_lines(store, "second")
    assert drawn[1].startswith(f"|-- data: {'a' * 12}  {store.artifact_folder(A)}/manifest.json: cannot be read")
    assert drawn[2] == "`-- file: sha256:ab /data/a.txt"
    assert [entry["state"] for entry in states.store_status(store)] == ["made"]
    with pytest.raises(ArtifactError, match="cannot be read"):
        reports.show_lines(store, "aaaa")


def test_an_artifact_under_another_id_is_not_made(store: Store) -> None:
    other = "d" * 64
    store.artifact_folder(B).rename(store.artifact_folder(other))
    assert store.find(other) is None
    assert store.damage(other) == ["manifest.json is that of bbbbbbbbbbbb"]


@pytest.mark.parametrize("odd", ["[]", "{", '{"path": "x"}', '{"path": 1, "overrides": [], "steps": []}', "\0"])
def test_an_odd_record_is_said_and_harms_no_other(store: Store, odd: str) -> None:
    (store.recipes / "odd.json").write_text(odd)
    (store.recipes / "folder.json").mkdir()
    entries, notes = states.store_status(store), store.oddities()
    assert [entry["step"] for entry in entries] == ["second"]
    assert len(notes) == 1
    assert notes[0].startswith(f"{store.recipes}/odd.json is left out: ")
    assert store.resolve("second")[0] == B


def test_lines_of_a_journal_that_are_none_are_passed_over(store: Store) -> None:
    events = [3, [], {}, {"event": "step"}, {"event": "step", "step": "x"}, {"event": "step", "step": 4}]
    assert [states.is_step(event) for event in events] == [False] * 5 + [True]
