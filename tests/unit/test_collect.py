"""What `gc` keeps and what it lets go, also of other runs."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError, StoreError
from pipeline.store import collect as module
from pipeline.store.collect import collect, forget_recipe
from pipeline.store.job import Job
from pipeline.store.proofs import remember
from pipeline.store.store import Store
from pipeline.store.work_folder import WorkFolder
from tests.unit.test_records import entry
from tests.unit.test_store import job, make

A, B, C, D, E = (letter * 64 for letter in "abcde")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """first <- second, first <- third; `demo` ran the second."""
    store = Store(tmp_path / "runs")
    make(store, "first", A)
    make(store, "second", B, {"data": A})
    make(store, "third", C, {"data": A})
    store.record("demo", entry("/demo.yaml", second=B))
    return store


def as_recorded(path: str, overrides: list[str]) -> set[str]:
    return set()


def begun(store: Store, step: str, artifact_id: str, input_ids: dict[str, str], **more: Any) -> Job:
    """A step that stopped before its first checkpoint."""
    the_job = job(store, step, artifact_id, input_ids).model_copy(update=more)
    store.begin(the_job)
    return the_job


def with_checkpoint(store: Store, step: str, artifact_id: str, inputs: dict[str, str]) -> Job:
    the_job = begun(store, step, artifact_id, inputs)
    checkpoints = store.checkpoints(step, artifact_id)
    checkpoints.path(5).mkdir(parents=True)
    (checkpoints.path(5) / "state").write_text("x" * 100)
    checkpoints.complete(5)
    return the_job


def works(store: Store) -> list[str]:
    return sorted(path.name for path in store.work.iterdir())


def test_what_no_plan_names_is_listed_first_and_then_removed(store: Store) -> None:
    said = collect(store, as_recorded, dry_run=True)
    assert said[0].startswith("would remove artifact cccccccccccc (third), ")
    assert said[1].startswith("would remove work third-cccccccc, ")
    assert said[2].startswith("2 folders, ")
    assert store.all_ids() == [A, B, C]
    done = collect(store, as_recorded)
    assert done == [line.replace("would remove", "removed") for line in said]
    assert store.all_ids() == [A, B]
    assert works(store) == ["first-aaaaaaaa", "second-bbbbbbbb"]
    assert not (store.folder / "trash").exists()
    assert collect(store, as_recorded) == ["0 folders, 0 B"]


def test_a_plan_counts_as_it_ran_and_as_it_is_now(store: Store) -> None:
    collect(store, lambda path, overrides: {C})
    assert store.all_ids() == [A, B, C]


def test_a_recipe_that_cannot_be_planned_now_keeps_what_it_made(store: Store) -> None:
    def current(path: str, overrides: list[str]) -> set[str]:
        raise RecipeError("broken")

    said = collect(store, current)
    assert said[0] == "recipe demo (/demo.yaml) cannot be planned now: what it made last is kept"
    assert store.all_ids() == [A, B]


def test_inputs_of_steps_that_are_not_made_yet_are_kept(store: Store) -> None:
    """The manifest that would name them does not exist: the record does."""
    planned = entry("/other.yaml", fourth=D)
    planned["steps"]["fourth"]["identity"] = {"inputs": {"data": C}}
    store.record("other", planned)
    assert collect(store, as_recorded)[-1] == "0 folders, 0 B"


def test_what_was_set_before_is_kept_until_only_the_current_is_wanted(store: Store) -> None:
    store.record("demo", entry("/demo.yaml", "third.beta=2", third=C))
    store.record("demo", entry("/demo.yaml", "third.beta=3", third=D))
    assert collect(store, as_recorded)[-1] == "0 folders, 0 B"
    said = collect(store, as_recorded, only_current=True, dry_run=True)
    assert said[0] == "would forget recipe demo --set third.beta=2 (/demo.yaml)"
    assert store.all_ids() == [A, B, C]
    assert collect(store, as_recorded, only_current=True)[-1].startswith("6 folders, ")
    assert store.all_ids() == []
    assert [plan.overrides for plan in store.records().plans] == [["third.beta=3"]]


def test_a_resumable_step_and_its_inputs_are_kept_and_said(store: Store) -> None:
    with_checkpoint(store, "fourth", D, {"data": C})
    said = collect(store, as_recorded)
    assert said[0].startswith("work fourth-dddddddd can resume and no recorded plan names it: it is kept")
    assert store.all_ids() == [A, B, C]
    collect(store, as_recorded, only_current=True)
    assert store.all_ids() == [A, B]
    assert "fourth-dddddddd" not in works(store)


def test_a_step_without_checkpoint_that_nothing_names_is_not(store: Store) -> None:
    begun(store, "fourth", D, {"data": C})
    collect(store, as_recorded)
    assert store.all_ids() == [A, B]
    assert works(store) == ["first-aaaaaaaa", "second-bbbbbbbb"]


@pytest.mark.parametrize("only_current", [False, True])
def test_a_running_step_keeps_its_inputs_by_id_and_by_path(store: Store, only_current: bool) -> None:
    """One input by its id; of one that was edited in its place, and counts by content, the folder."""
    make(store, "fifth", E)
    edited = {"more": str(store.artifact_folder(E))}
    the_job = begun(store, "fourth", D, {"data": C, "more": "sha256:0"}, inputs=edited)
    with WorkFolder(the_job.work_folder).locked():
        assert collect(store, as_recorded, only_current=only_current) == ["0 folders, 0 B"]
    assert store.all_ids() == [A, B, C, E]
    assert "fourth-dddddddd" in works(store)


def test_whole_ids_count_and_not_their_beginning(store: Store) -> None:
    """An artifact and a step whose ids begin like one that is needed."""
    other = B[:8] + C[8:]
    make(store, "fourth", other)
    collect(store, as_recorded)
    assert store.all_ids() == [A, B]
    assert works(store) == ["first-aaaaaaaa", "second-bbbbbbbb"]


def test_checkpoints_of_an_artifact_that_is_made_are_let_go(store: Store) -> None:
    """As a step leaves them that made it under another name. Its log stays."""
    work = with_checkpoint(store, "once", B, {"data": A}).work_folder
    (work / "log.txt").write_text("said")
    said = collect(store, as_recorded)
    assert any(line.startswith("removed checkpoints of work once-bbbbbbbb, whose artifact is made, ") for line in said)
    assert not (work / "checkpoints").exists()
    assert (work / "log.txt").exists()


def test_an_odd_record_keeps_what_recipes_of_its_name_made(store: Store) -> None:
    """All artifacts here say that the recipe `demo` made them."""
    (store.recipes / "demo-01234567.json").write_text("{")
    said = collect(store, as_recorded)
    assert "What recipes of this name made (3 artifacts) is kept" in said[0]
    assert store.all_ids() == [A, B, C]
    (store.recipes / "demo-01234567.json").rename(store.recipes / "another.json")
    collect(store, as_recorded)
    assert store.all_ids() == [A, B]


def test_damaged_manifests_and_jobs_stop_nothing_and_lose_no_lineage(store: Store) -> None:
    """The second's job still says what it was made from."""
    (store.artifact_folder(B) / "manifest.json").write_text("{")
    (store.artifact_folder(C) / "manifest.json").write_text("[]")
    (store.work_folder("first", A) / "job.json").write_text("\0")
    said = collect(store, as_recorded)
    assert said[0].startswith("removed artifact cccccccccccc (no readable manifest)")
    assert sorted(path.name for path in store.artifacts.iterdir()) == [A, B]


def test_an_artifact_keeps_what_it_was_made_from_without_its_work_folder(store: Store) -> None:
    """As one copied here from another store has none; the manifest alone says what the second was made from."""
    for folder in store.work.iterdir():
        shutil.rmtree(folder)
    collect(store, as_recorded)
    assert store.all_ids() == [A, B]


def test_what_is_no_artifact_is_left_alone(store: Store) -> None:
    (store.artifacts / ".DS_Store").touch()
    (store.artifacts / "notes").mkdir()
    (store.work / ".nfs0000").touch()
    collect(store, as_recorded)
    assert (store.artifacts / ".DS_Store").exists()
    assert (store.artifacts / "notes").exists()
    assert (store.work / ".nfs0000").exists()


def test_a_run_that_starts_while_folders_are_set_aside_gets_them_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two looks at what is needed, a run records a plan that needs the third."""
    before = module.set_aside

    def and_a_run_starts(*arguments: Any) -> Any:
        store.record("late", entry("/late.yaml", third=C))
        return before(*arguments)

    monkeypatch.setattr(module, "set_aside", and_a_run_starts)
    said = collect(store, as_recorded)
    assert said == [
        "kept artifact cccccccccccc (third): a run that has just started needs it",
        "kept work third-cccccccc: a run that has just started needs it",
        "0 folders, 0 B",
    ]
    assert store.find(C) is not None
    assert "third-cccccccc" in works(store)


def test_a_step_that_starts_while_folders_are_set_aside_keeps_its_own_and_gets_its_inputs_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes its lock when its input is out of sight, and before its own folder would be."""
    the_job = begun(store, "fourth", D, {"data": C})
    before, held = module.set_aside, contextlib.ExitStack()

    def and_it_starts(the_store: Store, folder: Path, batch: Path) -> Any:
        if folder == the_job.work_folder:
            held.enter_context(WorkFolder(folder).locked())
        return before(the_store, folder, batch)

    monkeypatch.setattr(module, "set_aside", and_it_starts)
    said = collect(store, as_recorded)
    held.close()
    assert said[0] == "kept artifact cccccccccccc (third): a run that has just started needs it"
    assert said[1].startswith("could not remove work fourth-dddddddd: it has just been started")
    assert the_job.work_folder.exists()
    assert store.find(C) is not None


def test_what_a_disk_does_not_put_back_is_not_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that starts between the two looks needs the third, which cannot go back now: the next collection does it."""
    before, rename = module.set_aside, Path.rename

    def and_a_run_starts(*arguments: Any) -> Any:
        store.record("late", entry("/late.yaml", third=C))
        return before(*arguments)

    def refused(path: Path, target: Path) -> Path:
        if "trash" in path.parts and path.name == C:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(module, "set_aside", and_a_run_starts)
        patched.setattr(Path, "rename", refused)
        with pytest.raises(OSError, match="Input/output error"):
            collect(store, as_recorded)
    assert store.all_ids() == [A, B]
    collect(store, as_recorded)
    assert store.all_ids() == [A, B, C]


def test_a_collection_that_was_killed_is_ended_by_the_next(store: Store) -> None:
    """One hour ago it had set aside the second, which is needed, and the third, which is not."""
    batch = store.folder / "trash" / f"gc-1-{time.time_ns() - int(3601e9)}"
    for artifact_id in (B, C):
        module.set_aside(store, store.artifact_folder(artifact_id), batch)
    said = collect(store, as_recorded)
    assert store.all_ids() == [A, B]
    assert any(line.startswith(f"removed leftover {batch.name}, ") for line in said)
    assert not (store.folder / "trash").exists()


def test_leftovers_of_a_process_that_may_be_at_work_are_left_alone(store: Store) -> None:
    collect(store, as_recorded)
    young = store.folder / "trash" / f"{E}-1-{time.time_ns()}"
    young.mkdir(parents=True)
    collect(store, as_recorded)
    assert young.exists()


def test_digests_of_what_is_gone_go_as_well(store: Store) -> None:
    for artifact_id in (B, C):
        remember(store.artifact_folder(artifact_id), {})
    collect(store, as_recorded)
    assert os.listdir(store.folder / "proofs") == [f"{B}.json"]


def test_a_recipe_can_be_forgotten_by_its_name_or_path(store: Store) -> None:
    store.record("demo", entry("/elsewhere.yaml", third=C))
    with pytest.raises(StoreError, match=r"demo: means several recipes: /demo.yaml, /elsewhere.yaml. Write the path."):
        forget_recipe(store, "demo")
    assert forget_recipe(store, "/demo.yaml") == ["forgot recipe demo (/demo.yaml)"]
    collect(store, as_recorded)
    assert store.all_ids() == [A, C]
    store.record("demo", entry("/elsewhere.yaml", third=C), running=True)
    with pytest.raises(StoreError, match=f"is being run by process {os.getpid()} on"):
        forget_recipe(store, "demo")
    with pytest.raises(StoreError, match=r"demo2: no recipe of this name or path ran in .* Did you mean 'demo'\?"):
        forget_recipe(store, "demo2")
