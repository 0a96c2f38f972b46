"""Killed at any instant and started again, a stage ends with the same weight file, byte for byte, as one never killed.

Loading torch takes longer than training, so that it is loaded twice for all jobs: their processes are forked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from stages.lib.rows.canonical import read_rows, write_rows
from tests.distributed.training_world import (
    GPT2_WITH_DROPOUT,
    Job,
    make_tokenizer,
    run_forked,
    write_chats,
    write_model,
    write_tokens,
)

pytestmark = pytest.mark.slow

# 64 blocks in steps of 16: the checkpoints of steps 3 and 6 lie in the first and in the second pass over the data.
COMMON = {
    "global_batch_size": 16,
    "max_steps": 9,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "evaluate_every_steps": 4,
}
PARAMS: dict[str, dict[str, Any]] = {
    "pretrain": {**COMMON, "architecture": GPT2_WITH_DROPOUT},
    "sft": {**COMMON, "max_length_tokens": 56},
    "ratings": {
        **COMMON,
        "max_length_tokens": 56,
        "attributes": {"length": 1.0, "form": 0.5},
        "heads": 3,
        "bootstrap": True,
    },
    "step_labels": {**COMMON, "max_length_tokens": 120},
}
MODULES = dict.fromkeys(("ratings", "step_labels"), "stages.alignment.reward")
RESOURCES = {"micro_batch_size": 4, "save_every_steps": 3, "log_every_steps": 2}


@dataclass
class Interrupted:
    """A job that was interrupted once and started again, and the same job left alone."""

    kind: str
    processes: int
    layout: str | None
    how: dict[str, Any] = field(default_factory=dict)
    """What `Job.die` or `Job.stop` takes."""

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.kind, self.processes, self.layout, *self.how.values())))

    def job(self, folder: Path, inputs: dict[str, dict[str, Path]]) -> Job:
        resources = {**RESOURCES, "deepspeed": self.layout}
        module = MODULES.get(self.kind, f"stages.language_model.{self.kind}")
        work, params = folder / self.name, PARAMS[self.kind]
        return Job(work, module, params, inputs[self.kind], resources, processes=self.processes)

    @property
    def whole(self) -> Interrupted:
        return replace(self, how={})


KILLED_IN_A_STEP = [
    Interrupted("pretrain", processes, layout, {"step": 8, "during": "step"})
    for processes, layout in [(1, None), (2, "zero1"), (2, "zero2"), (2, "zero3")]
]
KILLED_IN_A_STEP += [
    Interrupted(kind, 2, layout, {"step": 8, "during": "step"})
    for kind, layout in [("ratings", "zero2"), ("step_labels", "zero3")]
]
KILLED_IN_A_CHECKPOINT = [
    Interrupted("sft", processes, layout, {"step": 6, "during": "checkpoint"})
    for processes, layout in [(2, None), (2, "zero3")]
]
STOPPED = [
    Interrupted("sft", 2, "zero2", {"step": 5}),
    Interrupted("sft", 2, "zero3", {"step": 9}),
    Interrupted("pretrain", 2, None, {"heldout_at_step": 4}),
]
NO_ZERO = "no_zero.json"
"""In the folder of the world: a memory layout whose checkpoints are of use in it alone."""
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"resources": {**RESOURCES, "deepspeed": NO_ZERO}}, 2, "this run is 2 processes under DeepSpeed without ZeRO"),
    ({"params": {**PARAMS["sft"], "max_steps": 12}}, 2, "its total_steps is 9, the recipe's is 12"),
    ({"seed": 8}, 2, "its seed is 7, the recipe's is 8"),
    ({"params": {**PARAMS["sft"], "max_length_tokens": 40}}, 2, "its data is "),
]
OTHER_PROCESSES = replace(STOPPED[2], how={"step": 5})
TWICE = Interrupted("pretrain", 2, "zero3")


@dataclass
class World:
    folder: Path
    inputs: dict[str, dict[str, Path]]
    before: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Name -> the checkpoints that the interrupted job said it had written."""
    refusals: str = ""
    """What the refused jobs printed."""

    def job(self, case: Interrupted, **changes: Any) -> Job:
        return replace(case.job(self.folder, self.inputs), **changes)

    def saved(self, case: Interrupted) -> list[int]:
        return [line["step"] for line in self.before[case.name] if line["what"] == "checkpoint"]


def answered(chats: Path, folder: Path, make: Callable[[list[dict[str, Any]], int], dict[str, Any]]) -> Path:
    """Rows made of the first answer of each chat."""
    folder.mkdir()
    for split in ("train", "heldout"):
        rows = read_rows(chats / f"{split}.jsonl")
        write_rows(folder / f"{split}.jsonl", [make(row["messages"][:2], number) for number, row in enumerate(rows)])
    return folder


def as_ratings(chat: list[dict[str, Any]], number: int) -> dict[str, Any]:
    ratings = {"length": len(chat[1]["content"].split()) - 5, "form": None if number % 3 == 0 else number % 2}
    return {"prompt": chat[:1], "completion": chat[1:], "ratings": ratings}


def as_step_labels(chat: list[dict[str, Any]], number: int) -> dict[str, Any]:
    steps = [{"role": "assistant", "content": word} for word in chat[1]["content"].split()[:3]]
    return {"prompt": chat[:1], "steps": steps, "labels": [step["content"].islower() for step in steps]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = make_tokenizer()
    model = write_model(folder / "model", tokenizer, attention_dropout=0.2)
    chats = write_chats(folder / "chats")
    inputs = {
        "pretrain": {"tokens": write_tokens(folder / "tokens", tokenizer)},
        "sft": {"model": model, "chats": chats},
        "ratings": {"model": model, "ratings": answered(chats, folder / "ratings", as_ratings)},
        "step_labels": {"model": model, "step_labels": answered(chats, folder / "steps", as_step_labels)},
    }
    world = World(folder, inputs)
    killed = KILLED_IN_A_STEP + KILLED_IN_A_CHECKPOINT
    wholes = {case.whole.name: case.whole for case in [*killed, *STOPPED, TWICE]}.values()
    interrupted = [world.job(case, die=case.how) for case in killed]
    interrupted += [world.job(case, stop=case.how) for case in [*STOPPED, OTHER_PROCESSES]]
    run_forked(folder, [*interrupted, *map(world.job, wholes)])
    for case in [*killed, *STOPPED, OTHER_PROCESSES]:
        world.before[case.name] = world.job(case).events("progress")

    # Refused first: the checkpoints are there still, and must be left as they are.
    (folder / NO_ZERO).write_text('{"zero_optimization": {"stage": 0}}')
    refused = [
        world.job(STOPPED[0], may_fail=True, processes=processes, **under_own_layout(changes, folder))
        for changes, processes, _ in REFUSED
    ]
    again = [*map(world.job, [*killed, *STOPPED, TWICE]), world.job(OTHER_PROCESSES, processes=1)]
    world.refusals = run_forked(folder, [*refused, *again])
    return world


def under_own_layout(changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    resources = dict(changes.get("resources", {}))
    if resources.get("deepspeed") != NO_ZERO:
        return changes
    return {**changes, "resources": {**resources, "deepspeed": str(folder / NO_ZERO)}}


def without_times(job: Job, event: str) -> list[dict[str, Any]]:
    dropped = ("time", "seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in dropped} for line in job.events(event)]


def assert_same_end(job: Job, reference: Job) -> None:
    assert job.weights() == reference.weights()
    assert job.result() == reference.result()
    for event in ("step", "heldout"):
        assert without_times(job, event) == without_times(reference, event)


def assert_resumed(world: World, case: Interrupted, step: int) -> None:
    job = world.job(case)
    receipt = job.events("resume")
    assert [line["step"] for line in receipt] == [step]
    assert receipt[0]["data_position"] == step * 16
    assert_same_end(job, world.job(case.whole))


@pytest.mark.parametrize("case", KILLED_IN_A_STEP, ids=lambda case: case.name)
def test_killed_in_a_step(world: World, case: Interrupted) -> None:
    """Dropout, a learning rate that changes, the second pass over the data: step 8, and the checkpoint before it is 6."""
    assert world.saved(case) == [3, 6]
    assert_resumed(world, case, 6)


@pytest.mark.parametrize("case", KILLED_IN_A_CHECKPOINT, ids=lambda case: case.name)
def test_killed_while_a_checkpoint_is_written(world: World, case: Interrupted) -> None:
    """The half-written checkpoint 6 does not exist for us: training goes on from 3."""
    assert world.saved(case) == [3]
    assert_resumed(world, case, 3)


@pytest.mark.parametrize("case", STOPPED[:2], ids=lambda case: case.name)
def test_asked_to_stop(world: World, case: Interrupted) -> None:
    """Only the last process is asked; both save the step they are in (the last one, too) and stop; nothing is lost."""
    assert (world.job(case).work / "preempted").read_text() == f"at step {case.how['step']} of 9"
    assert world.saved(case)[-1] == case.how["step"]
    assert_resumed(world, case, case.how["step"])


def test_asked_to_stop_within_an_evaluation(world: World) -> None:
    """The evaluation of step 4 is cut short by the request, and made up for after the restart, in its place."""
    case = STOPPED[2]
    assert (world.job(case).work / "preempted").exists()
    assert world.saved(case) == [3, 4]
    assert [line["step"] for line in world.job(case).events("heldout")] == [0, 4, 8, 9]
    assert_resumed(world, case, 4)


def test_another_number_of_processes_without_deepspeed(world: World) -> None:
    """Stopped with two processes, finished by one: the same rows in the same steps, so nearly the same losses."""
    job, reference = world.job(OTHER_PROCESSES), world.job(OTHER_PROCESSES.whole)
    assert job.events("resume")[0]["step"] == 5
    # The first five lines are of steps 2, 4, 6, 8, 9.
    assert job.losses()[:2] == reference.losses()[:2]
    assert job.losses() == pytest.approx(reference.losses(), rel=1e-5)


def test_from_the_last_checkpoint_nothing_is_trained_again(world: World) -> None:
    """Finished, and run once more: the run resumes after the last step and publishes the same."""
    job = world.job(TWICE)
    assert [line["step"] for line in job.events("resume")] == [9]
    assert_same_end(job, world.job(KILLED_IN_A_STEP[3]))


@pytest.mark.parametrize("message", [message for _, _, message in REFUSED])
def test_a_checkpoint_of_another_run_is_refused(world: World, message: str) -> None:
    assert message in world.refusals
    assert "To start over, remove" in world.refusals
