"""Killed at any instant and started again, a stage ends with the same weight file, byte for byte, as one never killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.training_world import (
    GPT2_WITH_DROPOUT,
    LLAMA,
    Job,
    make_tokenizer,
    run_jobs,
    write_chats,
    write_model,
    write_tokens,
)

pytestmark = pytest.mark.slow

# 64 blocks in steps of 16: the checkpoints of steps 3 and 6 lie in the first and the second pass over the data.
COMMON = {
    "global_batch_size": 16,
    "max_steps": 9,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "evaluate_every_steps": 4,
}
RESOURCES = {"micro_batch_size": 2, "save_every_steps": 3, "log_every_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer()
    model = write_model(folder / "model", tokenizer, attention_dropout=0.2)
    return {
        "pretrain": {"tokens": write_tokens(folder / "tokens", tokenizer)},
        "sft": {"model": model, "chats": write_chats(folder / "chats")},
    }


def pretrain(work: Path, inputs: dict[str, dict[str, Path]], layout: str | None, **changes: object) -> Job:
    params = {**COMMON, "architecture": GPT2_WITH_DROPOUT}
    job = Job(work, "stages.language_model.pretrain", params, inputs["pretrain"], {**RESOURCES, "deepspeed": layout})
    return replace(job, **changes)  # type: ignore[arg-type]


def sft(work: Path, inputs: dict[str, dict[str, Path]], layout: str | None, **changes: object) -> Job:
    params = {**COMMON, "max_length_tokens": 56}
    job = Job(work, "stages.language_model.sft", params, inputs["sft"], {**RESOURCES, "deepspeed": layout})
    return replace(job, **changes)  # type: ignore[arg-type]


def without_times(job: Job, event: str) -> list[dict[str, object]]:
    dropped = ("time", "seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in dropped} for line in job.events(event)]


def assert_same_end(job: Job, reference: Job) -> None:
    assert job.weights() == reference.weights()
    assert job.result() == reference.result()
    for event in ("step", "heldout"):
        assert without_times(job, event) == without_times(reference, event)


@pytest.mark.parametrize(
    ("processes", "layouts"), [(1, [None, "zero1", "zero2", "zero3"]), (2, [None, "zero1", "zero2", "zero3"])]
)
def test_killed_in_a_step(
    tmp_path: Path, inputs: dict[str, dict[str, Path]], processes: int, layouts: list[str | None]
) -> None:
    """Dropout, a learning rate that changes, two processes: step 8 is in the second pass, the checkpoint before it is 6."""
    for layout in layouts:
        cut = pretrain(tmp_path / f"cut-{layout}", inputs, layout, die={"step": 8, "during": "step"})
        run_jobs(tmp_path, [cut], processes, expected=1)
        assert [line["step"] for line in cut.events("progress")] == [3, 6]
    references = [pretrain(tmp_path / f"whole-{layout}", inputs, layout) for layout in layouts]
    again = [pretrain(tmp_path / f"cut-{layout}", inputs, layout) for layout in layouts]
    run_jobs(tmp_path, [*references, *again], processes)
    for job, reference in zip(again, references, strict=True):
        assert job.events("resume")[0]["step"] == 6
        assert_same_end(job, reference)


@pytest.mark.parametrize(("processes", "layout"), [(1, None), (2, "zero2"), (2, "zero3")])
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, inputs: dict[str, dict[str, Path]], processes: int, layout: str | None
) -> None:
    """The half-written checkpoint 6 does not exist for us: training goes on from 3."""
    die = {"step": 6, "during": "checkpoint"}
    run_jobs(tmp_path, [sft(tmp_path / "cut", inputs, layout, die=die)], processes, expected=1)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-6").exists()
    again, reference = sft(tmp_path / "cut", inputs, layout), sft(tmp_path / "whole", inputs, layout)
    run_jobs(tmp_path, [reference, again], processes)
    assert again.events("resume")[0]["step"] == 3
    assert_same_end(again, reference)


@pytest.mark.parametrize("step", [5, 9])
def test_asked_to_stop(tmp_path: Path, inputs: dict[str, dict[str, Path]], step: int) -> None:
    """Only the last process is asked; both save the step they are in (the last one, too) and stop; nothing is lost."""
    stopped = sft(tmp_path / "stopped", inputs, "zero2", stop={"step": step})
    reference = sft(tmp_path / "whole", inputs, "zero2")
    run_jobs(tmp_path, [stopped, reference], 2)
    assert (stopped.work / "preempted").exists() and not (stopped.work / "result.json").exists()
    assert stopped.events("progress")[-1]["step"] == step
    again = sft(tmp_path / "stopped", inputs, "zero2")
    run_jobs(tmp_path, [again], 2)
    assert again.events("resume")[0]["step"] == step
    assert_same_end(again, reference)


def test_asked_to_stop_within_an_evaluation(tmp_path: Path, inputs: dict[str, dict[str, Path]]) -> None:
    """The evaluation of step 4 is cut short by the request and made up for after the restart, in its place."""
    stopped = pretrain(tmp_path / "stopped", inputs, None, stop={"heldout_at_step": 4})
    reference = pretrain(tmp_path / "whole", inputs, None)
    run_jobs(tmp_path, [stopped, reference], 2)
    assert [line["step"] for line in stopped.events("heldout")] == [0]
    assert stopped.events("progress")[-1]["step"] == 4
    again = pretrain(tmp_path / "stopped", inputs, None)
    run_jobs(tmp_path, [again], 2)
    assert_same_end(again, reference)


def test_resumes_after_the_last_step(tmp_path: Path, inputs: dict[str, dict[str, Path]]) -> None:
    """Finished, and run once more from its last checkpoint: nothing is trained, the same is published."""
    job = pretrain(tmp_path / "whole", inputs, "zero3")
    run_jobs(tmp_path, [job], 2)
    weights, steps = job.weights(), job.events("step")
    run_jobs(tmp_path, [job], 2)
    assert job.weights() == weights
    assert job.events("step") == steps


def test_other_processes_without_deepspeed(tmp_path: Path, inputs: dict[str, dict[str, Path]]) -> None:
    """Plain data parallelism resumes with another number of processes: the same rows, and nearly the same losses."""
    llama = {**COMMON, "architecture": LLAMA}
    stopped = pretrain(tmp_path / "stopped", inputs, None, stop={"step": 5}, params=llama)
    reference = pretrain(tmp_path / "whole", inputs, None, params=llama)
    run_jobs(tmp_path, [stopped, reference], 2)
    again = pretrain(tmp_path / "stopped", inputs, None, params=llama)
    run_jobs(tmp_path, [again], 1)
    assert again.losses() == pytest.approx(reference.losses(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"resources": {**RESOURCES, "deepspeed": "zero2"}}, 1, "was written by 2 processes, this run has 1"),
        ({"resources": {**RESOURCES, "deepspeed": "zero1"}}, 2, "was written under ZeRO-2, this run is under ZeRO-1"),
        (
            {"params": {**COMMON, "max_length_tokens": 56, "max_steps": 12}},
            2,
            "its total_steps is 9, the recipe's is 12",
        ),
        ({"seed": 8}, 2, "its seed is 7, the recipe's is 8"),
        ({"params": {**COMMON, "max_length_tokens": 40}}, 2, "its data is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path,
    stopped_under_zero2: Job,
    inputs: dict[str, dict[str, Path]],
    changes: dict[str, object],
    processes: int,
    message: str,
) -> None:
    output = run_jobs(tmp_path, [replace(stopped_under_zero2, stop=None, **changes)], processes, expected=1)
    assert message in output
    assert "To start over, remove" in output


@pytest.fixture(scope="module")
def stopped_under_zero2(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, dict[str, Path]]) -> Job:
    folder = tmp_path_factory.mktemp("stopped")
    job = sft(folder / "stopped", inputs, "zero2", stop={"step": 2})
    run_jobs(folder, [job], 2)
    return job
