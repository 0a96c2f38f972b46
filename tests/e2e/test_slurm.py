"""The tiny recipe on a real SLURM of two nodes: what is made there is what was made here, also after a node was taken away."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.e2e.driving import (
    ROOT,
    TINY,
    at_step,
    command,
    manifest_of,
    store_without,
    training_steps,
    weights,
    work_folder,
)
from tests.unit.tiny_disk import needs_a_disk_of_its_own

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
PROFILE = 'time: "30"\nsetup: ["export SLIPWAY_TEST_SETUP=1"]\nenvironment: {SLIPWAY_TEST: "$(touch pwned) \'a\'"}\n'
ON_TWO_NODES = [
    f"--set=stages.{step}.resources.{size}" for step in ("base", "chat") for size in ("nodes=2", "processes=1")
]
LONGEST_SECONDS = 240.0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return path


def slipway(slurm: Slurm, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=LONGEST_SECONDS
    )


def wait(holds: Callable[[], object], slurm: Slurm, store: Path) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            printed = [path.read_text()[-2000:] for path in store.glob("work/*/*.log")]
            raise AssertionError("\n".join([slurm.ask("squeue"), slurm.ask("sinfo", "-R"), *printed]))
        time.sleep(0.1)


def queue(slurm: Slurm) -> dict[str, tuple[str, str]]:
    """Name -> (id, state) of the jobs that wait or run."""
    lines = slurm.ask("squeue", "--noheader", "--format=%j %i %T").splitlines()
    return {name: (number, state) for name, number, state in map(str.split, lines)}


def test_two_nodes_make_what_one_machine_makes_though_one_is_taken_away(
    slurm: Slurm, profile: Path, tmp_path: Path, reference_store: Path
) -> None:
    """ZeRO-2 and ZeRO-3 across two nodes. The first training is preempted as SLURM does it, with SIGTERM to everything: it
    saves, queues itself again and goes on, and the second one waits for it.
    """
    store = store_without(reference_store, "base", tmp_path / "a 'store'")
    (store / "artifacts" / manifest_of(reference_store, "chat").artifact_id).unlink()
    submitting = ("submit", TINY, "--cluster", profile, "--until", "chat", "--store", store, *ON_TWO_NODES)
    submitted = slipway(slurm, *submitting)
    assert submitted.returncode == 0, submitted.stderr
    assert "2 submitted" in submitted.stdout
    wait(at_step(store, "base", 3), slurm, store)
    base, chat = (queue(slurm)[name] for name in ("base", "chat"))
    assert (base[1], chat[1]) == ("RUNNING", "PENDING")
    assert f"kept       job {chat[0]} pending (Dependency)" in slipway(slurm, *submitting).stdout

    slurm.ask("scancel", "--signal=TERM", "--full", base[0])
    wait(lambda: queue(slurm)["base"][1] == "PENDING", slurm, store)
    status = slipway(slurm, "status", "--store", store).stdout
    assert f"job {base[0]} pending" in status
    slurm.ask("scontrol", "update", f"JobId={base[0]}", "StartTime=now")
    wait(lambda: not queue(slurm), slurm, store)

    for step in ("base", "chat"):
        assert weights(store, step) == weights(reference_store, step)
        losses, expected = (
            [event["loss"] for event in training_steps(each, step)] for each in (store, reference_store)
        )
        assert losses == expected
    (console,) = work_folder(store, "base").glob("console-*.log")
    text = console.read_text()
    assert "stopped after a clean save: at step" in text
    assert text.count("$ srun --nodes=2") == 2
    assert not (ROOT / "pwned").exists()
    shown = slipway(slurm, "logs", "base", "--store", store).stdout
    assert f"==> {console} <==" in shown


def test_a_mistake_ends_its_chain_and_is_not_tried_again(slurm: Slurm, profile: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: mistaken
outputs: [text]
stages:
  rows:
    kind: clean
    params: {format: text, source: {kind: files, paths: ["it's $(touch pwned).jsonl"], layout: text}}
  text: {kind: mix, inputs: {sources: {rows: rows}}}
"""
    )
    (tmp_path / "it's $(touch pwned).jsonl").write_text('{"text": ""}\n')
    store = tmp_path / "store"
    submitted = slipway(slurm, "submit", recipe, "--cluster", profile, "--store", store)
    assert submitted.returncode == 0, submitted.stderr
    wait(lambda: not queue(slurm), slurm, store)
    assert "error:" in slipway(slurm, "logs", "rows", "--store", store).stdout
    states = slipway(slurm, "status", "--store", store).stdout
    assert "failed" in states
    assert not list((store / "artifacts").glob("*"))
    assert not [path for path in (*tmp_path.iterdir(), ROOT / "pwned") if path.name == "pwned" and path.exists()]


def test_a_cancelled_recipe_leaves_the_queue(slurm: Slurm, profile: Path, tmp_path: Path) -> None:
    """Its first job is held back, so that nothing of it runs."""
    held = tmp_path / "held.yaml"
    held.write_text(profile.read_text() + 'sbatch: ["--hold"]\n')
    store = tmp_path / "store"
    assert "4 submitted" in slipway(
        slurm, "submit", TINY, "--until", "tokens", "--cluster", held, "--store", store
    ).stdout  # fmt: skip
    assert len(queue(slurm)) == 4
    cancelled = slipway(slurm, "cancel", TINY, "--store", store)
    assert cancelled.stdout.count("cancelled ") == 4, cancelled.stderr
    assert queue(slurm) == {}
    assert "no job of this recipe" in slipway(slurm, "cancel", TINY, "--store", store).stdout


def test_the_doctor_tries_a_profile(slurm: Slurm, tmp_path: Path) -> None:
    """What SLURM refuses, what would wait for ever (SLURM itself takes it), and two nodes that work together."""
    path = tmp_path / "profile.yaml"
    path.write_text('time: "30"\nstages: {clean: {partition: nope}, sft: {partition: short}}\n')
    store = tmp_path / "a 'store'"
    tried = slipway(slurm, "doctor", "--cluster", path, "--store", store, "--patience", LONGEST_SECONDS)
    lines = [line for line in tried.stdout.splitlines() if line.split()[1] in ("scheduler", "requests", "nodes")]
    assert [(*line.split()[:2], line.split()[-1]) for line in lines[:1]] == [("ok", "scheduler", "10:00)")]
    requests = [line for line in lines if "requests" in line]
    assert [line.split()[0] for line in requests] == ["ok", "missing", "missing"], tried.stdout
    assert (
        "steps of kind clean: " in requests[1]
        and "nvalid partition" in requests[1]
        and "--partition=nope" in requests[1]
    )
    assert "steps of kind sft: asks for 30, and waits for ever: partition short" in requests[2]
    (together,) = [line for line in lines if "nodes" in line.split()[1]]
    assert together.startswith("ok ") and "2 nodes: n1, n2: all see the store" in together and "GB/s" in together
    assert tried.returncode == 2 and tried.stdout.endswith("2 required parts are missing\n")
    assert not list(store.iterdir()) and queue(slurm) == {}
    too_many = slipway(slurm, "doctor", "--cluster", path, "--store", store, "--nodes", 3)
    assert "steps that train, 3 nodes: " in too_many.stdout and "Ask for fewer with --nodes." in too_many.stdout


@needs_a_disk_of_its_own
def test_the_doctor_says_that_a_node_does_not_see_the_store(slurm: Slurm, profile: Path, tmp_path: Path) -> None:
    """The store lies on a filesystem that is mounted for the command alone."""
    (store := tmp_path / "store").mkdir()
    doctor = command("doctor", "--cluster", profile, "--nodes", 1, "--patience", LONGEST_SECONDS)
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@" --store "$0"', str(store)]
    tried = subprocess.run([*mounted, *doctor], cwd=ROOT, env=slurm.environment, capture_output=True, text=True)
    assert "the node does not see the store" in tried.stdout, tried.stdout + tried.stderr
    assert tried.returncode == 2
