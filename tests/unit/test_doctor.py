from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from pipeline.command import asking, doctor
from pipeline.command.doctor import Answer, Finding

GIBIBYTE = 2**30


def answered(value: dict[str, object]) -> Answer:
    return Answer(value, "", 4.2)


def device_answer(*names: str, built_for_cuda: str | None = "13.0") -> Answer:
    devices = [{"name": name, "memory_bytes": 80 * GIBIBYTE} for name in names]
    return answered(
        {"version": "2.13.0", "built_for_cuda": built_for_cuda, "devices": devices, "bfloat16": bool(names)}
    )


# What is printed, and the exit code


@pytest.mark.parametrize(
    ("found", "code", "verdict"),
    [
        ([Finding("ok", "Python", "3.12"), Finding("warn", "disk", "small")], 0, "nothing required is missing"),
        ([Finding("missing", "vllm", "serving", required=False)], 0, "nothing required is missing"),
        ([Finding("missing", "torch", "is not installed", "Install it.")], 2, "1 required part is missing"),
        ([Finding("missing", "a", "x"), Finding("missing", "b", "y")], 2, "2 required parts are missing"),
    ],
)
def test_only_a_missing_required_part_makes_the_exit_code_2(found: list[Finding], code: int, verdict: str) -> None:
    stream = io.StringIO()
    assert doctor.examine(found, stream) == code
    assert stream.getvalue().splitlines() == [*map(str, found), verdict]


def test_a_finding_is_one_line_with_what_to_do() -> None:
    finding = Finding("missing", "torch", "is not installed", "Install it.")
    assert str(finding) == "missing  torch        is not installed. Install it."
    assert str(Finding("missing", "vllm", "serving", required=False)) == "missing  vllm         optional: serving"


# Python and libraries


def test_an_old_python_is_missing() -> None:
    assert doctor.python_finding((3, 10, 4)).state == "missing"
    assert doctor.python_finding((3, 11, 0)).state == "ok"


def test_versions_outside_their_window_and_absent_ones_are_named() -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "5.18.0", "numpy": "2.4.6", "safetensors": "0.8.0"}
    names = ["numpy>=2.2,<3", "torch==2.13.*", "safetensors>=0.8,<0.9", "transformers>=5.17,<5.18", "datasets<6"]
    lines = [str(f) for f in doctor.library_findings([Requirement(name) for name in names], versions.get)]
    assert lines == [
        "ok       torch        2.13.0+cpu (needed: ==2.13.*)",
        f"missing  transformers 5.18.0 is there; needed: >=5.17,<5.18. {doctor.INSTALL}",
        f"missing  datasets     is not installed; needed: <6. {doctor.INSTALL}",
        "ok       libraries    2 more, each within the versions that pyproject.toml names",
    ]


def test_the_project_itself_is_where_the_versions_are_read() -> None:
    names = {requirement.name for requirement in doctor.required_libraries()}
    assert {*doctor.NAMED_LIBRARIES, "pydantic", "datatrove"} <= names


# Devices and ranks


def test_devices_are_named_with_their_memory() -> None:
    (finding,) = doctor.device_findings(device_answer("H200", "H200"), 16, 128 * GIBIBYTE)
    expected = "2 x CUDA 13.0: H200, 80.0 GiB; H200, 80.0 GiB; bfloat16; 16 cores, 128.0 GiB of memory"
    assert (finding.state, finding.what) == ("ok", expected)


def test_a_torch_that_cannot_be_loaded_is_missing() -> None:
    (finding,) = doctor.device_findings(Answer(None, "ImportError: libcudart.so", 1.0), 2, 0)
    assert (finding.state, finding.required) == ("missing", True)
    assert "ImportError: libcudart.so" in finding.what


@pytest.mark.parametrize(("num_devices", "backend"), [(0, "gloo"), (1, "gloo"), (2, "nccl"), (8, "nccl")])
def test_ranks_talk_with_nccl_only_where_each_has_a_device(num_devices: int, backend: str) -> None:
    commands: list[Sequence[str]] = []

    def ask(command: Sequence[str], timeout_seconds: float) -> Answer:
        commands.append(command)
        return answered({"rank": 0, "size": 2, "sum": 1})

    finding = doctor.ranks_finding(num_devices, ask)
    assert commands[0][-3:] == ["launch.probe", "ranks", backend]
    assert (finding.state, finding.what) == ("ok", f"two processes added up a number with {backend} in 4.2 s")


def test_ranks_that_add_up_wrongly_are_missing() -> None:
    finding = doctor.ranks_finding(0, lambda command, timeout: answered({"rank": 0, "size": 1, "sum": 0}))
    assert finding.state == "missing"
    assert "added 0 and 1 to" in finding.what


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_answer_of_a_probe_is_its_last_line() -> None:
    answer = doctor.ask(python("print('chatter'); print('{\"size\": 2}')"), 60)
    assert answer.value == {"size": 2}


def test_a_probe_that_fails_says_why() -> None:
    answer = doctor.ask(python("raise RuntimeError('no route to host')"), 60)
    assert (answer.value, answer.error) == (None, "RuntimeError: no route to host")


def test_a_probe_that_says_nothing_is_no_answer() -> None:
    assert doctor.ask(python("pass"), 60).error == "ended with exit code 0"


def test_a_program_that_is_not_there_is_no_answer() -> None:
    assert doctor.ask(["/no/such/program"], 60).error == "/no/such/program cannot be started: No such file or directory"


def test_a_probe_that_hangs_is_ended() -> None:
    answer = doctor.ask(python("import time; time.sleep(60)"), 0.5)
    assert (answer.value, answer.error) == (None, "no answer after 0.5 s")
    assert answer.seconds < 30


def test_the_first_exception_of_a_log_is_the_one_that_counts() -> None:
    log = "[rank1]: Traceback:\n[rank1]: RuntimeError: connect timed out\nChildFailedError: \nroot cause\n"
    assert asking.last_error(log) == "RuntimeError: connect timed out"
    assert asking.last_error("a\nb\n\n") == "b"
    assert asking.last_error("") == ""


# Disk

MOUNTS = """\
overlay / overlay rw,relatime 0 0
/dev/sda1 /home ext4 rw 0 0
storage:/export /home/shared nfs4 rw 0 0
tmpfs /home/shared/my\\040scratch tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/shared/runs", ("storage:/export", "/home/shared", "nfs4")),
        ("/home/shared/my scratch/x", ("tmpfs", "/home/shared/my scratch", "tmpfs")),
        ("/home/sharedness", ("/dev/sda1", "/home", "ext4")),
        ("/srv", ("overlay", "/", "overlay")),
    ],
)
def test_the_deepest_mount_holds_a_path(path: str, expected: tuple[str, str, str]) -> None:
    assert doctor.mount_of(Path(path), MOUNTS) == expected


def test_the_later_of_two_mounts_on_one_point_covers_the_earlier() -> None:
    mounts = "a /data ext4 rw 0 0\nb /data lustre rw 0 0\n"
    assert doctor.mount_of(Path("/data/runs"), mounts) == ("b", "/data", "lustre")


@pytest.mark.parametrize(
    ("kind", "state", "word"),
    [
        ("lustre", "ok", "shared"),
        ("fuse.juicefs", "ok", "shared"),
        ("ext4", "warn", "local to this machine"),
        ("tmpfs", "warn", "gone after a restart"),
    ],
)
def test_the_filesystem_of_the_store(kind: str, state: str, word: str, tmp_path: Path) -> None:
    finding = doctor.filesystem_finding(tmp_path / "not" / "there" / "yet", f"device / {kind} rw 0 0\n")
    assert finding.state == state
    assert word in finding.what


def test_without_a_table_of_mounts_nothing_is_claimed(tmp_path: Path) -> None:
    assert doctor.filesystem_finding(tmp_path, "").state == "warn"


def test_a_store_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (finding,) = doctor.disk_findings(tmp_path / "runs")
    assert (finding.state, finding.required) == ("missing", True)


@pytest.mark.parametrize(("free_gibibytes", "state"), [(19, "warn"), (21, "ok")])
def test_little_room_is_a_warning(
    free_gibibytes: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=free_gibibytes * GIBIBYTE)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (finding,) = doctor.disk_findings(tmp_path)
    assert finding.state == state
    assert f"{free_gibibytes}.0 GiB free" in finding.what


# Compiled kernels and optional parts


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path) -> None:
    old, fresh = tmp_path / "py311_cpu" / "op" / "lock", tmp_path / "py311_cpu" / "other" / "lock"
    for lock in (old, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (1000.0, 1000.0))
    os.utime(fresh, (4500.0, 4500.0))
    (finding,) = doctor.stale_build_findings(tmp_path, now=4600.0)
    assert finding.state == "warn"
    assert f"{old} is 1.0 h old" in finding.what
    assert list(doctor.stale_build_findings(tmp_path / "none", now=0.0)) == []


def test_a_missing_compiler_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.compiler_finding()
    assert (finding.state, finding.required) == ("missing", False)
    assert "g++" in finding.what


def test_optional_parts_never_fail_and_say_how_to_install_them_where_they_help() -> None:
    with_device = {f.subject: f for f in doctor.optional_findings(1, {"trl": "1.16.0"}.get)}
    assert not any(f.required for f in with_device.values() if f.state == "missing")
    assert with_device["flash-attn"].hint == "" and "no stage uses it yet" in with_device["flash-attn"].what
    assert with_device["trl"].state == "ok"
    without = {f.subject: f for f in doctor.optional_findings(0, lambda name: None)}
    assert without["flash-attn"].hint == ""
    assert "CUDA device only" in without["flash-attn"].what


@pytest.mark.slow
def test_this_machine_is_fit(tmp_path: Path) -> None:
    """Real probes: torch is loaded, and two processes add up their ranks."""
    stream = io.StringIO()
    code = doctor.examine(doctor.findings(tmp_path), stream)
    lines = stream.getvalue().splitlines()
    assert code == 0, stream.getvalue()
    assert sum(line.startswith("ok       ranks") for line in lines) == 1, stream.getvalue()
    assert sum(line.startswith("ok       devices") for line in lines) == 1, stream.getvalue()


def test_a_user_without_a_home_folder_has_a_folder_of_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for torch itself, which takes `~` for a name then; a HOME of this form is one that no user has."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", "~nobody-of-this-name")
    assert doctor.extensions_folder() == Path("~nobody-of-this-name/.cache/torch_extensions")
