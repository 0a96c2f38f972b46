"""How a step ends that is refused, that is stopped, or whose disk is full: exit code, sentence, and what it leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.command import states
from pipeline.errors import DataError
from pipeline.running.leftovers import drop_failed
from pipeline.settings.strict import CHECKOUT
from pipeline.store.artifact import read_manifest
from pipeline.store.checkpoints import COMPLETE
from pipeline.store.disk import refusal
from pipeline.store.work_folder import WorkFolder
from tests.unit.failing_stages import DRIVER, begun, planned, run
from tests.unit.tiny_disk import ROOT, needs_a_disk_of_its_own, on_a_disk_of


def test_what_a_refused_step_had_written_is_removed_and_its_message_says_so(tmp_path: Path) -> None:
    code, output = run(tmp_path, "gate")
    assert code == 2
    assert "error: params.bar: is missed. Lower it." in output
    assert (
        "error: What it had written (2.0 kB) was removed; `--set stages.one.resources.keep_failed_output=true` keeps it."
        in output
    )
    assert not planned(tmp_path, "gate")[0].step("one").work.joinpath("out").exists()


def test_what_a_refused_step_had_written_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    code, output = run(tmp_path, "gate", "stages.one.resources.keep_failed_output=true")
    out = planned(tmp_path, "gate")[0].step("one").work / "out"
    assert code == 2
    assert f"error: What it had written lies in {out} until the step runs again." in output
    assert (out / "model.bin").stat().st_size == 2000


SCRATCH = {"library.log", "link", "rows", "rows.npy"}
KEPT = {"job.json", "log.txt", "journal.jsonl", "outcome.json", "ranks", "spent.json", "start.json", "checkpoints"}


@pytest.mark.parametrize(
    ("amount", "keep", "code", "left", "taken"),
    [
        ("a mistake", False, 2, {"library.log"}, "8.0 kB"),
        ("a mistake after a checkpoint", False, 2, SCRATCH, "2.0 kB"),
        ("the store refuses", False, 2, SCRATCH, "2.0 kB"),
        ("a bug", False, 1, {*SCRATCH, "out"}, ""),
        ("a mistake", True, 2, {*SCRATCH, "out"}, ""),
    ],
)
def test_scratch_files_go_where_no_later_run_can_use_them(
    tmp_path: Path, amount: str, keep: bool, code: int, left: set[str], taken: str
) -> None:
    number = ["", "a mistake", "a mistake after a checkpoint", "the store refuses", "a bug"].index(amount)
    overrides = [f"one.amount={number}", f"stages.one.resources.keep_failed_output={str(keep).lower()}"]
    ended, output = run(tmp_path, "scratch", *overrides)
    work = planned(tmp_path, "scratch", *overrides)[0].step("one").work
    found = {path.name for path in work.iterdir() if not path.name.startswith("lock")}
    assert (ended, found - KEPT) == (code, left), output
    said = [line for line in output.splitlines() if "What it had written" in line]
    assert len(said) == (code == 2), output
    if taken:
        assert f"What it had written ({taken}) was removed; `--set stages.one.resources" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("amount", [1, 2000])
def test_scratch_files_of_a_group_go_once_all_ranks_have_ended(tmp_path: Path, amount: int) -> None:
    """Rank 0 is the first to fail; if it removed them at once, rank 1 would crash, and say so instead."""
    overrides = (f"one.amount={amount}", "stages.one.resources={launcher: torchrun, processes: 2, device: cpu}")
    code, output = run(tmp_path, "scratch_of_ranks", *overrides)
    work = planned(tmp_path, "scratch_of_ranks", *overrides)[0].step("one").work
    errors = [line.partition("; `")[0] for line in output.splitlines() if line.startswith("  error: ")]
    mistake = "  error: inputs.rows: 9% are broken. Mend them."
    both = ["  error: What it had written (2.0 kB) was removed", "  error: So were its scratch files (6.0 kB)."]
    left = ["  error: What it had written (6.0 kB) was removed"] if amount == 1 else both
    assert (code, errors) == (2, [mistake, *left]), output
    found = {path.name for path in work.iterdir() if not path.name.startswith("lock")}
    assert found <= {*KEPT, "rendezvous"}


def test_scratch_files_of_an_interrupted_run_stay_where_the_next_one_does_not_come_as_far(tmp_path: Path) -> None:
    """As where an input turns out to be damaged: it is made anew, and the step goes on."""
    job, store = begun(tmp_path, "scratch")
    (job.work_folder / "rows.npy").write_bytes(bytes(3000))
    assert not job.files.is_prepared
    assert drop_failed(job, "DataError") == 0
    job.files.write_start(None)
    assert drop_failed(job, "DataError") == 3000
    job.files.write_start(None)
    store.begin(job)
    assert not job.files.is_prepared


@pytest.mark.slow
def test_clean_leaves_no_rows_when_too_many_are_broken(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a whole row"}\n' * 200 + "{broken\n" * 100)
    (tmp_path / "recipe.yaml").write_text(
        "name: small\noutputs: [rows]\nstages:\n  rows: {kind: clean, params: {format: text, drop_exact_duplicates: false,"
        " source: {kind: files, layout: text, paths: [rows.jsonl], max_broken_fraction: 0.1}}}\n"
    )
    command = [sys.executable, "-m", "pipeline", "run", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    (work,) = (tmp_path / "runs" / "work").iterdir()
    assert ended.returncode == 2 and "max_broken_fraction" in ended.stdout, ended
    assert "kB) was removed; `--set stages.rows.resources.keep_failed_output=true` keeps it" in ended.stdout
    assert {path.name for path in work.iterdir() if not path.name.startswith("lock")} <= KEPT


def test_a_crash_is_still_a_crash(tmp_path: Path) -> None:
    code, output = run(tmp_path, "crash")
    assert code == 1
    assert "ZeroDivisionError: a bug" in output


def test_status_tells_a_step_that_failed_from_one_that_was_interrupted(tmp_path: Path) -> None:
    run(tmp_path, "gate")
    plan, store = planned(tmp_path, "gate")
    for entry in (*states.store_status(store), *states.plan_status(plan, store)):
        assert entry["state"] == "failed"
        assert entry["message"].startswith("params.bar: is missed. Lower it.")
    (line,) = states.status_lines(states.plan_status(plan, store), store)[2:]
    assert "failed" in line and "params.bar: is missed. Lower it.; log " in line
    begun(tmp_path, "gate")
    assert [entry["state"] for entry in states.store_status(store)] == ["interrupted"], "it is tried again"


def worker(work: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, work],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


LEAVING = """
import atexit, sys, threading, time
from pipeline.running.worker import leave

class Late:
    def __del__(self):
        print("finalized", flush=True)

late = Late()
atexit.register(print, "registered")
threading.Thread(target=time.sleep, args=(60,)).start()
print("said")
leave(75)
"""


def test_a_worker_leaves_at_once_and_with_what_was_registered_for_its_end() -> None:
    """The interpreter's own end waits for threads, and one that still holds a tensor of a process group kills it there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "said\nregistered\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_that_is_stopped_while_there_is_nothing_to_save_says_so(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Twice at once, as a launcher and a terminal may: the second must not disturb the end. 128 + the signal's number."""
    job, _ = begun(tmp_path, "wait")
    process = worker(job.work)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (
        128 + number,
        f"rank 0: received {number.name} while there was nothing to save\n",
    )
    assert job.files.outcome()["status"] == "stopped"
    assert job.files.running() is None


def test_a_worker_that_is_stopped_while_it_waits_for_others_says_so(tmp_path: Path) -> None:
    job, _ = begun(tmp_path, "save", "stages.one.resources={processes: 2, launcher: torchrun}")
    process = worker(job.work, RANK="0", WORLD_SIZE="2")
    while not job.files.meeting("start").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in output) == (128 + signal.SIGTERM, False), output
    assert "while there was nothing to save" in output


def test_a_stage_with_state_saves_and_ends_with_75(tmp_path: Path) -> None:
    job, _ = begun(tmp_path, "save")
    process = worker(job.work)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (75, "rank 0: stopped after a clean save: saved checkpoint 5\n")


@pytest.mark.slow
def test_a_wish_to_stop_is_heard_and_going_on_under_other_versions_is_said(tmp_path: Path) -> None:
    job, store = begun(tmp_path, "save")
    process = worker(job.work)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    job.files.request_stop()
    process.communicate(timeout=60)
    assert process.returncode == 75
    mark = store.checkpoints("one", job.artifact_id).path(5) / COMPLETE
    listed = json.loads(mark.read_bytes())
    environment = listed["environment"]
    assert environment["python"].startswith("CPython 3.")
    assert {"torch", "system", "processor", "device", "threads_per_process"} <= set(environment)
    new = environment["torch"]
    environment |= {"torch": "1.0.0", "threads_per_process": "99"}
    mark.write_text(json.dumps(listed))
    code, output = run(tmp_path, "save")
    assert code == 0, output
    threads = read_manifest(store.artifact_folder(job.artifact_id)).environment["threads_per_process"]
    assert (
        f"checkpoint 5 was written under other versions: threads_per_process 99 -> {threads}, torch 1.0.0 -> {new}"
        in output
    )


def test_a_manifest_says_what_else_can_change_bits(tmp_path: Path) -> None:
    code, output = run(tmp_path, "write")
    assert code == 0, output
    plan, store = planned(tmp_path, "write")
    environment = read_manifest(store.artifact_folder(plan.step("one").artifact_id)).environment
    assert set(environment) == {"python", "system", "processor", "device", "threads_per_process"}
    assert int(environment["threads_per_process"]) >= 1
    assert "other versions" not in output


def test_a_worker_that_finds_the_step_running_leaves_its_word_alone(tmp_path: Path) -> None:
    job, _ = begun(tmp_path, "wait")
    first = worker(job.work)
    assert first.stdout is not None
    assert first.stdout.readline() == "waiting\n"
    second = worker(job.work)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"is being run by process {first.pid}" in output
    assert job.files.outcome() == {}
    first.kill()
    first.communicate()


def raised(make: str) -> BaseException:
    try:
        exec(make, {"errno": errno})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise OSError(errno.ENOSPC, 'No space left on device', '/store/a')", "/store/a: cannot be written: No space"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/read', None, '/copy')",
            "/copy: cannot be written: No",
        ),
        ("raise OSError(errno.EDQUOT, 'Disk quota exceeded')", "/work: cannot be written: Disk quota exceeded"),
        (
            "raise OSError(errno.EROFS, 'Read-only file system', 'a')",
            "a: cannot be read or written: Read-only file system",
        ),
        (
            "raise PermissionError(errno.EACCES, 'Permission denied', 'a')",
            "a: cannot be read or written: Permission denied",
        ),
        (
            "raise RuntimeError('while writing') from OSError(errno.ENOSPC, 'No space left on device')",
            "/work: cannot be",
        ),
        (
            "try: raise OSError(errno.ENOSPC, 'No space left on device')\nexcept OSError: raise KeyError('a')",
            "/work: cannot be written: No space left on device",
        ),
        (
            "raise Exception('No space left on device (os error 28)')",
            "/work: cannot be written: No space left on device",
        ),
        (
            "raise RuntimeError('PytorchStreamWriter failed writing file data/1: file write failed')",
            "a file was cut short",
        ),
        ("raise OSError('5000 requested and 144 written')", "a file was cut short, 5000 requested and 144 written"),
    ],
)
def test_what_a_disk_refuses_is_told_from_faults_of_ours(code: str, words: str) -> None:
    refused = refusal(raised(code), Path("/work"))
    assert refused is not None
    assert words in str(refused)


@pytest.mark.parametrize(
    "code",
    [
        "1 / 0",
        "raise FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a')",
        "raise ConnectionError(errno.ECONNREFUSED, 'Connection refused')",
        "try: raise PermissionError(errno.EACCES, 'Permission denied', 'a')\nexcept OSError: raise KeyError('dealt with')",
        "try: raise OSError(errno.ENOSPC, 'No space left on device')\nexcept OSError: raise KeyError('a') from None",
    ],
)
def test_what_is_not_the_disk_s_is_a_crash(code: str) -> None:
    assert refusal(raised(code), Path("/work")) is None


def test_a_user_error_stays_what_it_is() -> None:
    assert refusal(DataError("rows: No space left on device"), Path("/work")) is None


FULL = """
import shutil
from pathlib import Path
from tests.unit.failing_stages import run
results = []
for pages in range(10):
    shutil.rmtree("runs", ignore_errors=True)
    Path("recipe.yaml").write_text("-" * 100)
    free = shutil.disk_usage(".").free // 4096
    Path("balloon").write_bytes(bytes(4096 * (free - pages)))
    results.append(run(Path.cwd(), "write"))
    Path("balloon").unlink()
print(repr(results))
"""


@pytest.mark.slow
@needs_a_disk_of_its_own
def test_a_full_disk_is_said_wherever_it_is_met(tmp_path: Path) -> None:
    """With 0, 1, 2, ... free pages the run gets further each time: the record, the work folder, the journal, the artifact."""
    results = eval(on_a_disk_of("256k", tmp_path / "disk", FULL))
    codes = [code for code, _ in results]
    assert set(codes) == {0, 2}
    assert codes == sorted(codes, reverse=True)
    assert codes.count(2) >= 5
    for code, output in results:
        assert "Traceback" not in output
        if code:
            assert "No space left on device" in output or "the disk is full" in output
            assert "Make room" in output


FEW_FILES = """
import os, shutil
from pathlib import Path
from tests.unit.failing_stages import run

store = Path("stores")
store.mkdir()
results = []
for place in range(60):
    # All but so many places for files are taken, and with each pass one more is free.
    shutil.rmtree(store / "runs", ignore_errors=True)
    (store / "recipe.yaml").touch()
    taken = [Path(f"taken{number}") for number in range(os.statvfs(".").f_favail - place)]
    for path in taken:
        path.touch()
    code, output = run(store, "write")
    results.append((code, output))
    for path in taken:
        path.unlink()
    if code == 0:
        break
print(repr(results))
"""


@pytest.mark.slow
@needs_a_disk_of_its_own
def test_a_disk_that_takes_no_more_files_is_said_like_a_full_one(tmp_path: Path) -> None:
    """Many small files use up the inodes of a disk on which there is room."""
    results = eval(on_a_disk_of("8m,nr_inodes=120", tmp_path / "disk", FEW_FILES))
    codes = [code for code, _ in results]
    assert codes[-1] == 0 and set(codes[:-1]) == {2} and len(codes) > 5
    for _, output in results[:-1]:
        assert "Traceback" not in output and "Make room" in output


@pytest.mark.slow
@needs_a_disk_of_its_own
def test_a_stage_that_fills_the_disk_ends_with_a_sentence_and_gives_the_room_back(tmp_path: Path) -> None:
    code = """
    from pathlib import Path
    from tests.unit.failing_stages import run
    print(repr((run(Path.cwd(), "wrap"), run(Path.cwd(), "write"))))
    """
    (wrapped, output), (after, _) = eval(on_a_disk_of("256k", tmp_path / "disk", code))
    assert wrapped == 2
    assert "cannot be written: No space left on device" in output
    assert "Make room (`slipway gc` removes what no recipe needs)" in output
    assert "was removed; `--set stages.one.resources.keep_failed_output=true` keeps it" in output
    assert "Traceback" not in output
    assert after == 0


LIBRARIES = """
import shutil
from pathlib import Path
import numpy as np, torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from pipeline.store.disk import refusal
from pipeline.store.work_folder import WorkFolder

makers = {
    "torch.save": lambda: torch.save(torch.zeros(10**6), "a.pt"),
    "torch.save of a small one": lambda: [torch.save(torch.zeros(300), f"{i}.pt") for i in range(900)],
    "numpy.save": lambda: np.save("a.npy", np.ones(10**6)),
    "numpy.savez": lambda: np.savez("a.npz", np.ones(10**6)),
    "safetensors": lambda: save_file({"a": torch.zeros(10**6)}, "a.safetensors"),
    "datasets": lambda: Dataset.from_dict({"a": list(range(10**6))}).save_to_disk("a"),
    "tokenizers": lambda: Tokenizer(models.BPE({f"t{i}": i for i in range(10**5)}, [])).save("a.json"),
}
said = {}
for name, make in makers.items():
    try:
        make()
        said[name] = "wrote it"
    except Exception as error:
        said[name] = str(refusal(error, Path("/work")))
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
print(repr(said))
"""


@pytest.mark.slow
@needs_a_disk_of_its_own
def test_the_words_of_the_libraries_that_stages_write_with_are_known(tmp_path: Path) -> None:
    said = eval(on_a_disk_of("600k", tmp_path / "disk", LIBRARIES).splitlines()[-1])
    assert len(said) == 7
    for name, sentence in said.items():
        assert sentence.startswith("/work: cannot be written: "), name


SLOW_COMMIT = f"""
import time
from pipeline.store.store import Store
commit = Store.commit
def slowly(*arguments, **options):
    print("committing", flush=True)
    time.sleep(5)
    return commit(*arguments, **options)
Store.commit = slowly
{DRIVER}
"""


@pytest.mark.slow
def test_a_wish_to_stop_does_not_take_away_what_is_being_committed(tmp_path: Path) -> None:
    """The stage has no state, so that it would be ended after 3 s; its result is whole, and hashing a large one takes longer."""
    job, store = begun(tmp_path, "write")
    command = [sys.executable, "-c", SLOW_COMMIT, job.work]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "committing\n"
        job.files.request_stop()
        worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert store.find(job.artifact_id) is not None
    assert job.files.outcome()["status"] == "done"


@pytest.mark.parametrize("statuses", [("crash", "done"), ("done", "crash")])
def test_what_is_done_outranks_a_rank_that_broke_down(tmp_path: Path, statuses: tuple[str, str]) -> None:
    files = WorkFolder(tmp_path)
    for rank, status in enumerate(statuses):
        files.report(rank, status)
    assert files.outcome()["status"] == "done"


def test_of_two_errors_the_first_is_heard(tmp_path: Path) -> None:
    files = WorkFolder(tmp_path)
    for rank, status in enumerate(("user_error", "crash")):
        files.report(rank, status)
    assert files.outcome()["status"] == "user_error"
