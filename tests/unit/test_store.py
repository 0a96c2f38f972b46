"""The store: commits, names, lineage, verification and collection."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.command import reports
from pipeline.errors import ArtifactError, DataError, RecipeError
from pipeline.settings.resources import Resources
from pipeline.store.artifact import Facts, FileEntry, Kind
from pipeline.store.collect import collect, needed_artifacts
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


def test_collection_keeps_current_plans_and_their_lineage(store: Store) -> None:
    def current(path: str, overrides: list[str]) -> set[str]:
        return {B}

    needed, notes = needed_artifacts(store, current)
    assert (needed, notes) == ({A, B}, [])
    said = collect(store, needed, dry_run=True)
    assert said[0].startswith("would remove artifact cccccccccccc (third)")
    assert store.all_ids() == [A, B, C]
    collect(store, needed, dry_run=False)
    assert store.all_ids() == [A, B]
    assert sorted(path.name for path in store.work.iterdir()) == ["first-aaaaaaaa", "second-bbbbbbbb"]


def test_collection_keeps_what_a_recipe_made_that_cannot_be_planned_now(store: Store) -> None:
    def current(path: str, overrides: list[str]) -> set[str]:
        raise RecipeError("broken")

    needed, notes = needed_artifacts(store, current)
    assert needed == {A, B}
    assert notes == ["recipe demo (demo.yaml) cannot be planned now: what it made last is kept"]
