"""One damaged or odd thing in a store: it is said, and all else goes on unharmed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.command import reports, states
from pipeline.errors import ArtifactError, StoreError
from pipeline.store.artifact import MANIFEST, list_files
from pipeline.store.collect import collect
from pipeline.store.journal import Journal
from pipeline.store.store import Store
from tests.unit.test_store import A, B, C, make

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`kept` made A and `broken` made B and C from A, and began an unfinished step."""
    store = Store(tmp_path / "runs")
    make(store, "first", A)
    make(store, "second", B, {"data": A})
    make(store, "third", C, {"data": B})
    for recipe, artifact_id in (("kept", A), ("broken", B)):
        steps = {"step": {"artifact_id": artifact_id, "identity": {}, "kind": "write"}}
        store.record(recipe, {"path": f"{recipe}.yaml", "overrides": [], "steps": steps})
    return store


def recorded(path: str, overrides: list[str]) -> set[str]:
    return {A} if path == "kept.yaml" else {B}


def a_text(path: Path) -> None:
    path.write_text("no JSON")


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def without_keys(path: Path) -> None:
    path.write_text('{"path": "broken.yaml", "steps": {"step": {}}}')


def of_other_types(path: Path) -> None:
    path.write_text('{"path": 3, "overrides": null, "steps": []}')


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


DAMAGES = [
    a_text, a_list, without_keys, of_other_types, no_text, nested, a_folder, a_pipe, a_link_to_nothing,
    a_link_to_a_device,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_said_harms_no_other_recipe_and_costs_no_artifact(
    store: Store, damage: Callable[[Path], None]
) -> None:
    """All of these say recipe `demo` in their manifest: when its record is damaged, all are kept."""
    path = store.recipes / "demo.json"
    damage(path)
    assert {entry["recipe"] for entry in states.store_status(store)} == {"broken", "kept"}
    counts = path.is_file()  # a folder or a link to nothing is no record
    assert [note.startswith(f"{path} is left out: ") for note in store.oddities()] == [True] * counts
    lines = collect(store, recorded, dry_run=True)
    assert ("0 folders, 0 B" in lines) == counts
    assert any("What recipes of this name made (3 artifacts) is kept" in line for line in lines) == counts


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_said_and_harms_nothing_else(store: Store, damage: Callable[[Path], None]) -> None:
    path = store.artifact_folder(B) / MANIFEST
    path.unlink()
    damage(path)
    assert store.find(A) is not None
    assert store.find(B) is None
    found = {entry["recipe"]: entry["state"] for entry in states.store_status(store)}
    assert found["kept"] == "made" != found["broken"]
    assert "first: text made by write" in reports.show_lines(store, A[:8])[0]
    is_there = damage is not a_link_to_nothing
    drawn = reports.lineage_lines(store, C[:8])[1]
    assert (
        drawn.startswith(f"|-- data: {B[:12]}")
        and ("cannot be read" in drawn or "no regular file" in drawn) == is_there
    )
    assert any(note.startswith("artifact bbbbbbbbbbbb: ") for note in store.oddities()) == is_there
    kept = [line.split(",")[0] for line in collect(store, lambda path, overrides: {A}, dry_run=True)]
    assert kept[0] == "would remove artifact cccccccccccc (third)"


@pytest.mark.parametrize("damage", [a_text, a_pipe, a_link_to_nothing, a_link_to_a_device])
@pytest.mark.parametrize("where", ["artifacts", "work"])
def test_what_lies_in_the_store_and_is_no_folder_is_said_and_left_alone(
    store: Store, damage: Callable[[Path], None], where: str
) -> None:
    path = store.folder / where / "odd"
    damage(path)
    assert store.all_ids() == [A, B, C]
    assert len(states.store_status(store)) == 2
    what = "artifact" if where == "artifacts" else "work folder"
    assert store.oddities() == [f"{path} is no {what}: it is passed over"]
    collect(store, recorded)
    assert os.path.lexists(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_unreadable_folder_harms_nothing_else() -> None:
    """As a user who may not look into one artifact, and one work folder."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        store = Store(Path(place, "runs"))
        make(store, "first", A)
        make(store, "second", B)
        steps = {
            name: {"artifact_id": artifact_id, "identity": {}, "kind": "write"}
            for name, artifact_id in (("first", A), ("second", B))
        }
        store.record("demo", {"path": "demo.yaml", "overrides": [], "steps": steps})
        store.artifact_folder(B).chmod(0o700)
        store.work_folder("second", B).chmod(0o700)
        # Python may lie where that user cannot look, so it becomes that user once it is loaded.
        code = "import os, sys; from pipeline.command import cli; os.setgroups([]); os.setgid(65534); os.setuid(65534); cli.main()"
        command = [sys.executable, "-c", code, "status", "--store", str(store.folder)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert f"note: {store.artifact_folder(B)} is no artifact: it is passed over" in process.stderr
    states = [line.split()[1::2][:2] for line in process.stdout.splitlines()[2:]]
    assert states == [["first", "made"], ["second", "not"]], "not made, as far as that user can see"


def test_a_manifest_of_another_artifact_is_damage(store: Store) -> None:
    (store.artifact_folder(A) / MANIFEST).replace(store.artifact_folder(B) / MANIFEST)
    assert store.find(B) is None
    assert store.damage(B) == [f"manifest.json is that of {A[:12]}"]


@pytest.mark.parametrize("damage", [a_pipe, a_link_to_nothing, a_link_to_a_device])
def test_what_is_no_file_cannot_become_part_of_an_artifact(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / "odd")
    with pytest.raises(ArtifactError, match=r"odd: is (no regular file|a link to nothing)\. Remove it"):
        list_files(tmp_path)


def test_a_file_of_an_artifact_that_became_a_pipe_is_damage_and_no_wait(store: Store) -> None:
    path = store.artifact_folder(A) / "text.txt"
    path.unlink()
    os.mkfifo(path)
    assert store.damage(A) == ["text.txt is no regular file"]
    assert reports.verify_lines(store, A)[0][0].endswith("text.txt is no regular file")


@pytest.mark.parametrize("name", ["file", "file/below", "link", "~nobody-of-this-name/runs", "x" * 300])
@pytest.mark.parametrize("command", [["status"], ["gc"], ["plan", "pipeline/recipes/quickstart.yaml"]])
def test_where_no_store_can_be_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, command: list[str]
) -> None:
    from pipeline.command import cli

    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    place = name if name.startswith("~") else str(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["slipway", *command, "--store", place])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error: {place}: cannot be a store: ")
    assert said.endswith("Choose another place with --store or SLIPWAY_STORE.\n")


def test_a_store_that_cannot_be_written_says_so(store: Store) -> None:
    remaining = store.recipes.with_name("elsewhere")
    store.recipes.rename(remaining)
    store.recipes.write_text("a file in the way")
    with pytest.raises(StoreError, match=r"recipes: cannot be written: File exists\. Choose another place"):
        store.record("demo", {"path": "demo.yaml", "overrides": [], "steps": {}})


def test_a_line_that_was_torn_costs_itself_and_not_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"event": "note", "text": "a"}\nnull\n[1]\n\xff\n{"event": "no')
    journal = Journal(path, writes=True)
    journal.note("b")
    journal.note("c")
    assert [event["text"] for event in journal.events("note")] == ["a", "b", "c"]


def catches_interrupts(process: subprocess.Popen[str]) -> bool:
    """Whether a handler of the process's own stands for SIGINT, as the kernel knows."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(mask >> (signal.SIGINT - 1) & 1)


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that the tests start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, standard error) of a process after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel who handles a signal")
def test_ctrl_c_ends_a_command_that_loads_at_once(tmp_path: Path) -> None:
    """Python's own handler stands first, then none: a shell calls that end 130."""
    command = [sys.executable, "-m", "pipeline", "status", "--store", str(tmp_path / "runs")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    for phase in (True, False):
        while catches_interrupts(process) != phase:
            assert process.poll() is None
    assert interrupted(process) == (-signal.SIGINT, "")


def test_ctrl_c_ends_a_command_that_works_with_130() -> None:
    code = """
import sys, time
from pipeline.__main__ import main
from pipeline.command import reports
def work(stages):
    print("working", flush=True)
    time.sleep(60)
reports.stage_table = work
sys.argv = ["slipway", "stages"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    assert interrupted(process) == (130, "")
