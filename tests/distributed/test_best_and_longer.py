"""Trainings that publish the best, stop early, or make another one longer: killed and started again, in one process and in two.

What is learned by heart from few chats harms on others, so that the best step lies within.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.checkpoints import Checkpoints
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats, write_model

pytestmark = pytest.mark.slow

PARAMS: dict[str, Any] = {
    "global_batch_size": 4,
    "max_steps": 14,
    "learning_rate": 2e-2,
    "schedule": "constant",
    "warmup_steps": 1,
    "max_length_tokens": 56,
    "evaluate_every_steps": 2,
    "publish_best": {"metric": "heldout_loss"},
}
STOPPING = {**PARAMS, "stop_early": {"metric": "heldout_loss", "patience": 3}}
LONGER = 20
RESOURCES = {"micro_batch_size": 2, "save_every_steps": 5, "log_every_steps": 3, "keep_checkpoints": 1}
LAYOUTS = [(1, None), (2, "zero3")]


@dataclass
class World:
    folder: Path
    inputs: dict[str, Path]
    jobs: dict[str, Job] = field(default_factory=dict)

    def add(self, name: str, params: dict[str, Any], processes: int, layout: str | None, **changes: Any) -> Job:
        resources = {**RESOURCES, "deepspeed": layout}
        stage = "stages.language_model.sft"
        job = Job(self.folder / name, stage, params, self.inputs, resources, processes=processes, **changes)
        self.jobs[name] = job
        return job


def checkpoints(job: Job) -> Checkpoints:
    return Checkpoints(job.work / "checkpoints")


def measured(job: Job) -> dict[int, float]:
    return {line["step"]: line["heldout_loss"] for line in job.events("heldout") if line["step"]}


def best_of(job: Job, last: int = PARAMS["max_steps"]) -> int:
    losses = {step: loss for step, loss in measured(job).items() if step <= last}
    return min(losses, key=lambda step: losses[step])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("best")
    tokenizer = make_tokenizer()
    model = write_model(folder / "model", tokenizer, attention_dropout=0.2)
    world = World(folder, {"model": model, "chats": write_chats(folder / "chats", num_chats=10, num_heldout=8)})
    wholes = [world.add(f"whole-{n}-{layout}", PARAMS, n, layout) for n, layout in LAYOUTS]
    wholes += [world.add(f"stopped-{n}-{layout}", STOPPING, n, layout) for n, layout in LAYOUTS]
    wholes += [world.add(f"long-{n}-{layout}", {**PARAMS, "max_steps": LONGER}, n, layout) for n, layout in LAYOUTS]
    run_forked(folder, wholes)
    first, second = [], []
    for n, layout in LAYOUTS:
        best = best_of(world.jobs[f"whole-{n}-{layout}"])
        # In the checkpoint of the best, and in the step after it.
        for name, step, during in (("saved", best, "checkpoint"), ("after", best + 1, "step")):
            job = world.add(f"{name}-{n}-{layout}", PARAMS, n, layout, die={"step": step, "during": during})
            first.append(job)
            second.append(replace(job, die=None))
        job = world.add(f"ended-{n}-{layout}", STOPPING, n, layout, die={"step": best + 6, "during": "checkpoint"})
        first.append(job)
        second.append(replace(job, die=None))
        extended = str(checkpoints(world.jobs[f"whole-{n}-{layout}"]).path(PARAMS["max_steps"]))
        longer = {**PARAMS, "max_steps": LONGER}
        die = {"step": LONGER - 1, "during": "step"}
        job = world.add(f"longer-{n}-{layout}", longer, n, layout, die=die, extends=extended)
        first.append(job)
        second.append(replace(job, die=None))
    run_forked(folder, first)
    run_forked(folder, second)
    return world


def each(name: str) -> list[str]:
    return [f"{name}-{n}-{layout}" for n, layout in LAYOUTS]


def without_times(job: Job, event: str, after: int = 0) -> list[dict[str, Any]]:
    dropped = ("time", "seconds", "tokens_per_second")
    lines = [line for line in job.events(event) if line["step"] > after]
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]


def assert_same_end(job: Job, reference: Job, after: int = 0) -> None:
    assert job.weights() == reference.weights()
    assert job.result() == reference.result()
    for event in ("step", "heldout"):
        assert without_times(job, event, after) == without_times(reference, event, after)


@pytest.mark.parametrize("name", each("whole"))
def test_the_best_is_published_and_both_are_told(world: World, name: str) -> None:
    job = world.jobs[name]
    best, last = best_of(job), PARAMS["max_steps"]
    assert 2 < best < last - 6, "the test would prove nothing"
    metrics, facts = job.result()["metrics"], job.result()["facts"]
    assert metrics["heldout_loss"] == measured(job)[best]
    assert metrics["heldout_loss_last"] == measured(job)[last]
    assert (facts["optimizer_steps"], metrics["published_step"], metrics["last_step"]) == (best, best, last)
    assert checkpoints(job).steps() == [best, last]


@pytest.mark.parametrize("place", ["saved", "after"])
@pytest.mark.parametrize("layout", each(""))
def test_killed_around_the_best_it_ends_alike(world: World, place: str, layout: str) -> None:
    """While its checkpoint is written, and between that and the next step."""
    job = world.jobs[place + layout]
    assert len(job.events("resume")) == 1
    assert_same_end(job, world.jobs["whole" + layout])


@pytest.mark.parametrize("layout", each(""))
def test_stopped_early_after_a_kill_it_ends_at_the_same_step(world: World, layout: str) -> None:
    """Killed while the checkpoint is written with which it ends."""
    job, whole = world.jobs["ended" + layout], world.jobs["whole" + layout]
    assert_same_end(job, world.jobs["stopped" + layout])
    best = best_of(whole)
    assert list(measured(job)) == list(range(2, best + 7, 2))
    assert job.weights() == whole.weights()


def test_any_number_of_processes_decides_alike(world: World) -> None:
    jobs = [world.jobs[name] for name in each("stopped")]
    assert len({(best_of(job), max(measured(job))) for job in jobs}) == 1
    for job in jobs[1:]:
        assert list(measured(job).values()) == pytest.approx(list(measured(jobs[0]).values()), rel=1e-4)


@pytest.mark.parametrize("layout", each(""))
def test_made_longer_and_killed_it_is_one_that_was_so_long(world: World, layout: str) -> None:
    """The best step, which is published, lies in what it extends."""
    job = world.jobs["longer" + layout]
    last = PARAMS["max_steps"]
    assert [line["step"] for line in job.events("resume")] == [last, 15]
    assert_same_end(job, world.jobs["long" + layout], after=last)
