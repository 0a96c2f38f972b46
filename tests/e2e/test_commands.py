"""The command as a user meets it: mistakes, changes, launchers, and what the other commands say."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.running.lifeline import ranks_below
from pipeline.store.work_folder import WorkFolder
from tests.e2e.driving import (
    ROOT,
    TINY,
    at_step,
    checkpoints,
    command,
    manifest_of,
    slipway,
    store_without,
    wait_for,
    weights,
    work_folder,
)

pytestmark = pytest.mark.slow

MISTAKES = """
name: mistakes
outputs: [chat, loop_b, mismatched]
stages:
  rows: {kind: clean, params: {format: text, source: nowhere.yaml}}
  text: {kind: mix, inputs: {sources: {docs: rows}}, params: {heldout_fractoin: 0.1}}
  text: {kind: mix}
  base:
    kind: pretrain
    params: {architecture: {model_type: llama}, global_batch_size: 8.5, max_steps: 10, learning_rate: "2e-5"}
  chat: {kind: sft, inputs: {model: base, chats: text}, params: {global_batch_size: 8, max_steps: 10, learning_rate: 1e-3}}
  loop_a: {kind: evaluate, inputs: {models: {x: loop_b}}}
  loop_b: {kind: evaluate, inputs: {models: {x: loop_a}}}
  mismatched: {kind: pretrian}
  unused: {kind: tokenizer, inputs: {text: text}}
"""


def test_ten_mistakes_are_printed_at_once_without_a_traceback_and_nothing_is_created(tmp_path: Path) -> None:
    recipe = tmp_path / "mistakes.yaml"
    recipe.write_text(MISTAKES)
    ended = slipway("run", recipe, "--store", tmp_path / "store")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr + ended.stdout
    for words in (
        "mistakes.yaml:7: the key 'text' stands here a second time (first on line 6). Remove one.",
        "stages.rows.params.source: no such file or folder: nowhere.yaml",
        "stages.text.params.heldout_fractoin: unknown field. Did you mean 'heldout_fraction'?",
        "stages.base.params.global_batch_size: must be a whole number, not the number 8.5. Write a whole number.",
        "stages.base.params.learning_rate: must be a number, not the string '2e-5'. Remove the quotes.",
        "stages.base.inputs.tokens: is required: tokens.",
        "stages.loop_a.inputs: the stages wait for each other: loop_a <- loop_b <- loop_a. Remove one of these inputs.",
        "stages.loop_a.inputs.models.x: needs",
        "stages.mismatched.kind: there is no stage 'pretrian'. Did you mean 'pretrain'?",
        "stages.unused: no output needs this stage. Add it to `outputs`, or remove it.",
    ):
        assert f"error: {recipe}: {words}" in ended.stderr or f"error: {tmp_path}/{words}" in ended.stderr, (
            words,
            ended.stderr,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mistakes.yaml"]


def test_one_changed_parameter_reruns_its_stage_and_what_depends_on_it(reference_store: Path) -> None:
    ended = slipway("plan", TINY, "--store", reference_store, "--set", "aligned.beta=0.3", "--json")
    steps = {step["name"]: step for step in json.loads(ended.stdout)["steps"]}
    assert {name for name, step in steps.items() if step["action"] == "run"} == {"aligned", "grpo", "int8", "report"}
    assert steps["aligned"]["reason"] == "beta 0.1 -> 0.3"
    assert steps["int8"]["reason"] == "input 'model' changed"
    assert steps["grpo"]["reason"] == "input 'reference' changed"


def printed_commands(store: Path) -> dict[str, str]:
    """Launcher -> the command line that `slipway job` prints for the step `aligned`."""
    printed = slipway("job", TINY, "aligned", "--store", store)
    assert printed.returncode == 0, printed.stderr
    lines = [line.strip() for line in printed.stdout.splitlines() if line.startswith("  ")]
    return {Path(shlex.split(line)[0]).name: line for line in lines}


def test_torchrun_and_deepspeed_and_the_printed_commands_make_the_same_weights(
    reference_store: Path, tmp_path: Path
) -> None:
    store = store_without(reference_store, "aligned", tmp_path / "store")
    by_launcher = printed_commands(store)
    assert sorted(by_launcher) == ["deepspeed", "torchrun"]
    pasted = subprocess.run(by_launcher["deepspeed"], shell=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert pasted.returncode == 0, pasted.stdout[-3000:] + pasted.stderr[-3000:]
    assert weights(store, "aligned") == weights(reference_store, "aligned")

    other = store_without(reference_store, "aligned", tmp_path / "other")
    line = printed_commands(other)["torchrun"]
    pasted = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert pasted.returncode == 0, pasted.stdout[-3000:] + pasted.stderr[-3000:]
    assert weights(other, "aligned") == weights(reference_store, "aligned")

    again = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert "is made already: nothing to do" in again.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_exits_with_75_and_goes_on_to_the_same_weights(
    reference_store: Path, tmp_path: Path, number: int
) -> None:
    store = store_without(reference_store, "base", tmp_path / "store")
    process = subprocess.Popen(
        command("run", TINY, "--only", "base", "--store", store), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for(at_step(store, "base", 2), process, store)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "stopped" in output
    stopped_at = checkpoints(store, "base").newest().step
    assert 2 <= stopped_at < 24
    ended = slipway("run", TINY, "--only", "base", "--store", store)
    assert ended.returncode == 0, ended.stdout
    assert f"checkpoint {stopped_at} of 24, verified" in ended.stdout
    assert weights(store, "base") == weights(reference_store, "base")


def test_status_tells_what_runs_since_when_and_where_its_log_is(reference_store: Path, tmp_path: Path) -> None:
    store = store_without(reference_store, "topics", tmp_path / "store")
    process = subprocess.Popen(
        command("run", TINY, "--only", "topics", "--store", store), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not (work_folder(store, "topics") / "start.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    entries = json.loads(slipway("status", "--store", store, "--json").stdout)
    running = next(entry for entry in entries if entry["step"] == "topics")
    second = slipway("run", TINY, "--only", "topics", "--store", store)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert running["state"] == "running"
    assert Path(running["log"]).name == "log.txt"
    assert running["since"] > time.time() - 240
    assert second.returncode == 0
    assert re.search(r"topics  waits  .* runs it; log: ", second.stdout)
    assert "waits for process " in second.stdout
    assert "is made already" in second.stdout


def test_lineage_goes_from_a_report_to_the_digest_of_the_source(reference_store: Path) -> None:
    ended = slipway("lineage", "report", "--store", reference_store)
    assert ended.returncode == 0
    assert "models.aligned: aligned  dpo v" in ended.stdout
    assert "source.root: sha256:" in ended.stdout


def test_show_and_verify_read_an_artifact_by_the_first_digits_of_its_id(reference_store: Path) -> None:
    digits = manifest_of(reference_store, "int8").artifact_id[:10]
    shown = slipway("show", digits, "--store", reference_store)
    assert "int8: quantized_lm made by quantize" in shown.stdout
    assert "heldout_perplexity_original" in shown.stdout
    verified = slipway("verify", digits, "--store", reference_store)
    assert verified.returncode == 0
    assert "are as they were written" in verified.stdout


def test_chat_answers_and_ends_with_the_input(reference_store: Path) -> None:
    talked = subprocess.run(
        command("chat", "aligned", "--store", reference_store, "--max-new-tokens", 8, "--temperature", 0),
        cwd=ROOT, input="What does dumps do?\nAnd loads?\n/exit\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert talked.returncode == 0, talked.stderr
    assert len(talked.stdout.strip()) > 0


def test_the_module_is_the_same_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "pipeline", "stages"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "pretrain" in ended.stdout


def test_gc_removes_what_no_plan_needs_and_says_so_first(reference_store: Path, tmp_path: Path) -> None:
    store = store_without(reference_store, "report", tmp_path / "store")
    orphan = store / "artifacts" / ("0" * 64)
    source = reference_store / "artifacts" / manifest_of(reference_store, "report").artifact_id
    orphan.mkdir()
    for file in source.iterdir():
        (orphan / file.name).write_bytes(file.read_bytes())
    said = slipway("gc", "--dry-run", "--store", store)
    assert "would remove artifact 000000000000 (report)" in said.stdout
    assert orphan.exists()
    done = slipway("gc", "--store", store)
    assert done.returncode == 0, done.stderr
    assert not orphan.exists()
    assert len(list((store / "artifacts").iterdir())) == len(list((reference_store / "artifacts").iterdir())) - 1


def test_a_group_whose_rank_is_stopped_at_its_start_ends_when_asked_to(reference_store: Path, tmp_path: Path) -> None:
    """Before the rank has left its mark: Linux tells that it is stopped, and the group is ended after 6 s."""
    store = store_without(reference_store, "base", tmp_path / "store")
    stopped: list[int] = []
    process = subprocess.Popen(
        command("run", TINY, "--only", "base", "--store", store), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip

    def rank_is_stopped() -> bool:
        if rank := ranks_below(process.pid, str(work_folder(store, "base"))).get(1):
            os.kill(rank.pid, signal.SIGSTOP)
            stopped.append(rank.pid)
        return bool(rank)

    wait_for(rank_is_stopped, process, store)
    assert not WorkFolder(work_folder(store, "base")).mark(1).exists()
    process.send_signal(signal.SIGTERM)
    asked_at = time.monotonic()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"rank 1 (process {stopped[0]} is stopped; `kill -CONT {stopped[0]}` lets it go on) for 6 s" in output
    assert time.monotonic() - asked_at < 40
