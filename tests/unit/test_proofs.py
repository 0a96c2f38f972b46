"""Inputs are proven before they are used: what is hashed and when, what counts as damage, and the way out of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.command import reports
from pipeline.command.naming import model_folder
from pipeline.errors import ArtifactError
from pipeline.running.proving import prove_inputs
from pipeline.running.stopping import Stopped, StopSignals
from pipeline.store import proofs as module
from pipeline.store.artifact import MANIFEST, read_manifest, would_be_read
from pipeline.store.job import Job
from pipeline.store.journal import Journal
from pipeline.store.proofs import known_damage, prove, remember
from pipeline.store.store import Store
from tests.unit.test_plan import RECIPE, actions, planned, run

OTHER = "has other content than when it was written"


def made(folder: Path, step: str) -> Path:
    """The artifact's folder."""
    plan, store = planned(folder)
    return store.artifact_folder(plan.step(step).artifact_id)


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ran")
    assert run(folder)[0] == 0
    return folder / "runs"


@pytest.fixture
def world(tmp_path: Path, ran_once: Path) -> Path:
    """A folder with a store in which the recipe has run."""
    shutil.copytree(ran_once, tmp_path / "runs")
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def age(folder: Path) -> None:
    """As if the artifact had been written long ago, and nothing were remembered of it."""
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    module.proof_file(folder).unlink(missing_ok=True)


@pytest.mark.slow
def test_a_flipped_bit_is_not_read_and_the_step_that_made_it_runs_again(tmp_path: Path) -> None:
    assert run(tmp_path, until="second")[0] == 0
    assert run(tmp_path, until="first")[0] == 0
    flip(made(tmp_path, "first") / "text.txt")
    assert actions(planned(tmp_path)[0])["first"].startswith("skip made")
    code, said = run(tmp_path)
    assert code == 2
    assert f"error: inputs.data: {made(tmp_path, 'first')}/text.txt {OTHER}: the artifact is damaged. Run the" in said
    assert "Traceback" not in said
    assert actions(planned(tmp_path)[0])["first"] == f"run its artifact is damaged: text.txt {OTHER}"
    code, said = run(tmp_path)
    assert code == 0, said
    store = Store(tmp_path / "runs")
    assert all(
        not prove(store.artifact_folder(each), read_manifest(store.artifact_folder(each))) for each in store.all_ids()
    )


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["damaged", "gone", "edited manifest", "another artifact"])
def test_inputs_that_are_no_longer_what_was_planned_are_refused(world: Path, changed: str) -> None:
    """In a job that was written before: `plan` does not look again. Each sentence says what and what to do."""
    plan, store = planned(world)
    first, second = made(world, "first"), made(world, "second")
    if changed == "damaged":
        flip(first / "text.txt")
        expected = f"{first}/text.txt {OTHER}: the artifact is damaged."
    elif changed == "gone":
        shutil.rmtree(first)
        expected = f"{first} is no longer there."
    elif changed == "edited manifest":
        (first / MANIFEST).write_text((first / MANIFEST).read_text().replace('"count": 3', '"count": 4'))
        expected = f"{first}/manifest.json {OTHER}: the artifact is damaged."
    else:
        shutil.rmtree(first)
        shutil.copytree(second, first)
        expected = f"{first} holds the artifact {second.name[:12]}, not {first.name[:12]}."
    assert f"inputs.data: {expected} Run the recipe again" in refused(plan.step("joined").job("demo", store))


def refused(job: Job) -> str:
    """What the worker says of the job's inputs."""
    with pytest.raises(ArtifactError) as caught:
        prove_inputs(job, Journal(job.work_folder / "journal.jsonl", writes=False), lambda: False)
    return str(caught.value)


@pytest.mark.slow
def test_outside_files_and_folders_that_changed_after_the_plan_are_refused(world: Path) -> None:
    """One that is named by a param, one that is an input by its content; all are told at once."""
    (world / "words.txt").write_text("one")
    copy = world / "copy" / "first"
    shutil.copytree(made(world, "first"), copy)
    flip(copy / "text.txt")
    text = RECIPE.replace("count: 3", "count: 3, file: words.txt")
    plan, store = planned(world, text=text)
    (world / "words.txt").write_text("two")
    hint = "Run the recipe again: it is planned with what lies there now."
    said = refused(plan.step("first").job("demo", store))
    assert said == f"params.file: {world}/words.txt has changed since the step was planned. {hint}"
    (world / "words.txt").unlink()
    assert "is not there. Correct the path." in refused(plan.step("first").job("demo", store))
    plan, store = planned(world, text=by_path(copy))
    (copy / "text.txt").write_text("another")
    said = refused(plan.step("o").job("demo", store))
    assert said == f"inputs.data: {copy} has changed since the step was planned. {hint}"


def test_a_request_to_stop_is_heard_before_each_input(world: Path) -> None:
    plan, store = planned(world)
    job = plan.step("joined").job("demo", store)
    signals = StopSignals(job.files, is_main=True)
    store.begin(job)
    job.files.request_stop()
    with pytest.raises(Stopped) as stopped:
        prove_inputs(job, Journal(job.files.journal, writes=False), signals)
    assert stopped.value.exit_code == 143, "nothing had begun, so nothing was saved"


def test_what_was_hashed_is_not_hashed_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, until="first")
    folder = made(tmp_path, "first")
    manifest = read_manifest(folder)
    read: list[str] = []
    digest = module.digest_file
    monkeypatch.setattr(module, "digest_file", lambda path: read.append(Path(path).name) or digest(path))
    assert prove(folder, manifest) == {}
    assert read == [], "the worker remembered what it committed"
    age(folder)
    assert known_damage(folder, manifest) == {}
    assert read == []
    assert prove(folder, manifest) == prove(folder, manifest) == {}
    assert read == ["text.txt"]
    assert prove(folder, manifest, again=True) == {}
    assert read == ["text.txt"] * 2
    flip(folder / "text.txt")
    os.utime(folder / "text.txt", (1, 1))
    assert prove(folder, manifest) == {"text.txt": OTHER}
    assert read == ["text.txt"] * 3
    assert known_damage(folder, manifest) == {"text.txt": OTHER}
    assert read == ["text.txt"] * 3


def test_that_a_file_is_sound_is_remembered_once_it_has_settled_and_that_it_is_damaged_at_once(world: Path) -> None:
    folder = made(world, "first")
    file = module.proof_file(folder)
    assert file == world / "runs" / "proofs" / f"{folder.name}.json"
    file.unlink()
    (folder / "text.txt").touch()
    prove(folder, read_manifest(folder))
    assert json.loads(file.read_bytes())["files"] == {}
    flip(folder / "text.txt")
    prove(folder, read_manifest(folder))
    assert list(json.loads(file.read_bytes())["files"]) == ["text.txt"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"files": 3}', '{"files": {"text.txt": 1}}', '{"files": {"text.txt": [[], 2]}}']
)
def test_odd_proofs_are_none(world: Path, content: str) -> None:
    folder = made(world, "first")
    module.proof_file(folder).write_text(content)
    assert prove(folder, read_manifest(folder)) == {}


def test_plan_verify_hashes_everything_and_reruns_what_is_damaged(world: Path) -> None:
    """Also where size and times are as they were, as after a fault of the disk: then only hashing shows it."""
    folder = made(world, "second")
    flip(folder / "text.txt")
    remember(folder, read_manifest(folder).files)
    assert actions(planned(world)[0])["second"].startswith("skip")
    verified = actions(planned(world, verify=True)[0])
    assert verified["second"] == f"run its artifact is damaged: text.txt {OTHER}"
    assert verified["first"].startswith("skip")
    assert actions(planned(world)[0])["second"].startswith("run its artifact is damaged")


def test_verify_hashes_again_whatever_is_remembered(world: Path) -> None:
    folder = made(world, "first")
    flip(folder / "text.txt")
    remember(folder, read_manifest(folder).files)
    lines, sound = reports.verify_lines(Store(world / "runs"), "first")
    assert not sound
    assert lines == [
        f"{folder.name[:12]} first: text.txt {OTHER}",
        "Run the recipe again: it makes the artifact anew, as `slipway plan` now says.",
    ]


def test_files_that_nothing_reads_are_a_note_and_nothing_more(world: Path) -> None:
    folder = made(world, "second")
    for name in (".nfs0000", ".DS_Store", "text.txt~", "notes.md"):
        (folder / name).touch()
    assert {line.split()[0] for line in actions(planned(world)[0]).values()} == {"skip"}
    lines, sound = reports.verify_lines(Store(world / "runs"), "second")
    assert sound
    assert lines[0].endswith("are as they were written")
    assert [line.split("note: ")[1] for line in lines[1:]] == [
        f"{name} was added; nothing reads it" for name in (".DS_Store", ".nfs0000", "notes.md", "text.txt~")
    ]
    assert run(world, "joined.beta=0.2")[0] == 0


def test_a_file_that_would_be_read_is_refused_before_and_at_the_start(world: Path) -> None:
    plan, store = planned(world, "joined.beta=0.2")
    folder = made(world, "first")
    (folder / "adapter_config.json").write_text("{}")
    blocked = planned(world, "joined.beta=0.2")[0].step("joined")
    assert blocked.action == "blocked"
    assert str(blocked.reason) == (
        f"input 'data' holds adapter_config.json, which its manifest does not list: move it out of {folder}; beta 0.1 -> 0.2"
    )
    said = refused(plan.step("joined").job("demo", store))
    assert f"inputs.data: {folder}/adapter_config.json was added to the artifact and would be read. Move it" in said
    lines, sound = reports.verify_lines(store, "first")
    assert not sound
    assert lines[1].endswith("adapter_config.json was added, and would be read: move it elsewhere")
    (folder / "adapter_config.json").unlink()
    assert planned(world, "joined.beta=0.2")[0].step("joined").action == "run"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter_config.json", True),
        ("model-00003.safetensors", True),
        ("templates/tool.jinja", True),
        ("vocab.txt", True),
        ("modeling.py", True),
        ("notes.txt", False),
        ("README.md", False),
        ("config.json~", False),
        ("config.json.orig", False),
        (".config.json.swp", False),
        (".cache/config.json", False),
    ],
)
def test_what_loaders_read(name: str, expected: bool) -> None:
    assert would_be_read(name) == expected


def by_path(folder: Path) -> str:
    return f"name: outer\noutputs: [o]\nstages:\n  o: {{kind: join, inputs: {{data: {folder}}}}}\n"


@pytest.mark.slow
def test_a_copy_is_the_artifact_only_if_its_files_are(world: Path) -> None:
    source = made(world, "first")
    copy = world / "copy" / "first"
    shutil.copytree(source, copy)
    assert planned(world, text=by_path(copy))[0].step("o").input_ids == {"data": source.name}
    assert run(world, text=by_path(copy))[0] == 0
    (copy / ".DS_Store").touch()
    (copy / "README.md").touch()
    assert actions(planned(world, text=by_path(copy))[0])["o"].startswith("skip")
    flip(copy / "text.txt")
    (copy / "config.json").touch()
    edited = planned(world, text=by_path(copy))[0].step("o")
    assert edited.action == "run"
    assert edited.input_ids["data"].startswith("sha256:")
    assert str(edited.reason) == (
        "input 'data' changed; input 'data' differs from its manifest: text.txt, config.json: taken as an input of its own"
    )
    code, said = run(world, text=by_path(copy))
    assert code == 0, said
    assert "differs from its manifest" in str(planned(world, text=by_path(copy))[0].step("o").reason)


@pytest.mark.parametrize(("old", "new"), [('"count": 3', '"count": 4'), ('"train_rows": 3', '"train_rows": 9')])
def test_an_edited_manifest_makes_another_input(world: Path, old: str, new: str) -> None:
    copy = world / "copy" / "first"
    shutil.copytree(made(world, "first"), copy)
    text = (copy / MANIFEST).read_text()
    assert old in text
    (copy / MANIFEST).write_text(text.replace(old, new))
    step = planned(world, text=by_path(copy))[0].step("o")
    assert step.input_ids["data"].startswith("sha256:")
    assert "differs from its manifest: manifest.json" in str(step.reason)


def test_a_manifest_of_before_there_were_seals_and_one_laid_out_anew_are_sound(world: Path) -> None:
    copy = world / "copy" / "first"
    shutil.copytree(made(world, "first"), copy)
    block = json.loads((copy / MANIFEST).read_bytes())
    for text in (json.dumps(dict(reversed(block.items()))), json.dumps({**block, "seal": None})):
        (copy / MANIFEST).write_text(text)
        assert planned(world, text=by_path(copy))[0].step("o").input_ids["data"] == block["artifact_id"]


def test_a_chat_is_not_held_with_what_is_damaged_and_says_of_a_copy_that_it_was_edited(world: Path) -> None:
    source, store = made(world, "first"), world / "runs"
    copy = world / "copy" / "first"
    shutil.copytree(source, copy)
    for name in ("first", str(source), str(copy)):
        assert model_folder(name, store)[1] == [], name
    flip(copy / "text.txt")
    (copy / "config.json").write_text("{}")
    assert model_folder(str(copy), store) == (copy, [f"{copy} differs from its manifest: text.txt, config.json"])
    (source / "chat_template.jinja").touch()
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: was added and would be read. Move it elsewhere"):
        model_folder("first", store)
    (source / "chat_template.jinja").unlink()
    flip(source / "text.txt")
    for name in ("first", str(source)):
        with pytest.raises(ArtifactError, match=r"is damaged: text\.txt not as written\. Run the recipe again"):
            model_folder(name, store)
    assert actions(planned(world)[0])["first"].startswith("run")
    assert run(world)[0] == 0
    assert model_folder("first", store)[1] == []


def test_an_artifact_of_a_store_that_is_named_by_its_path_is_no_copy(world: Path) -> None:
    """What differs there is damage: it is not trained on as an input of its own, and the way out works."""
    source = made(world, "first")
    (world / "runs" / "proofs").rename(world / "gone")
    flip(source / "text.txt")
    step = planned(world, text=by_path(source))[0].step("o")
    assert (step.action, step.input_ids) == ("blocked", {"data": source.name})
    assert str(step.reason) == (
        "input 'data' lies in a store and differs from its manifest: text.txt;"
        " run the recipe that made it again, or name a copy that lies elsewhere"
    )
    assert run(world, until="first")[0] == 0
    assert planned(world, text=by_path(source))[0].step("o").action == "run"
