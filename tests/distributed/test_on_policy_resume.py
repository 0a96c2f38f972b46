"""Killed at any instant and started again, on-policy training ends with the same files, byte for byte, as if it never was.

The instants are drawn from a seeded generator. How many there are of each sort for one and for two processes says the
environment variable KILLS_PER_PHASE; tests/README.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store.artifact import list_files
from pipeline.store.checkpoints import Checkpoints
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import REWARDS, write_policy

pytestmark = pytest.mark.slow

KILLS_PER_PHASE = int(os.environ.get("KILLS_PER_PHASE", "2"))

# Everything that a restart could restore wrongly changes on the way: the learning rate with every step, the KL coefficient
# and the moments of the rewards with every rollout. Checkpoints lie after steps 4, 8, 12, 16 and 18; a rollout has 6.
ROLLOUTS, ROLLOUT_STEPS, PASS_STEPS, MICRO_BATCH = 3, 6, 2, 4
STEPS = ROLLOUTS * ROLLOUT_STEPS
SAVED = (4, 8, 12, 16, 18)
COMMON: dict[str, Any] = {
    "rewards": REWARDS,
    "rollouts": ROLLOUTS,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "epochs_per_rollout": ROLLOUT_STEPS // PASS_STEPS,
    "max_prompt_tokens": 40,
    "max_new_tokens": 6,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "normalize_rewards": True,
    "kl_coefficient": 0.1,
    "evaluate_every_rollouts": 2,
    "heldout_prompts": 4,
}
PPO = {**COMMON, "kl_target": 0.02, "kl_horizon": 80}
PARAMS: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "ppo_lora": {**PPO, "adapter": {"method": "lora", "rank": 4}},
    "grpo": COMMON,
    # What is written in the background is restored as well: the weights that wrote it are gone.
    "grpo_background": {**COMMON, "background_rollouts": True, "mismatch_cap": 2.0},
    "grpo_prefix": {**COMMON, "learning_rate": 3e-2, "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}},
    "rloo": {**COMMON, "ptx_coefficient": 0.5, "ptx_batch_size": 4},
    # 16 pairs of each rollout, 8 in each step.
    "online_dpo": {**COMMON, "rollout_batch_size": 32, "normalize_rewards": False},
}
KINDS = ("ppo", "grpo", "rloo", "online_dpo")
RESOURCES = {"micro_batch_size": MICRO_BATCH, "save_every_steps": 4, "log_every_steps": 1}


@dataclass(frozen=True)
class Run:
    """A job that is left alone, or one that was interrupted and started again."""

    params: str
    processes: int
    layout: str | None
    number: int = 0
    die: dict[str, Any] = field(default_factory=dict, hash=False)
    stop: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        how = [str(each) for each in (*self.die.values(), *self.stop.values())]
        number = [str(self.number)] if how else []
        return "-".join([self.params, str(self.processes), self.layout or "plain", *how, *number])

    @property
    def whole(self) -> Run:
        return replace(self, number=0, die={}, stop={})

    def job(self, world: World, **changes: Any) -> Job:
        kind = f"stages.alignment.{next(kind for kind in KINDS if self.params.startswith(kind))}"
        params = PARAMS[self.params]
        inputs = {"model": world.model, "prompts": world.chats}
        if "ptx_coefficient" in params:
            inputs["chats"] = world.chats
        job = Job(
            world.folder / self.name,
            kind,
            params,
            inputs,
            {**RESOURCES, "deepspeed": self.layout},
            processes=self.processes,
        )
        return replace(job, **changes)


ALONE = [Run("ppo", 1, None), Run("ppo_lora", 1, None), Run("rloo", 1, "zero1"), Run("grpo_prefix", 1, "zero2")]
TOGETHER = [Run("ppo", 2, "zero2"), Run("grpo", 2, None), Run("ppo_lora", 2, "zero3"), Run("ppo", 2, "zero3")]
PAIRS = Run("online_dpo", 2, "zero2")
BACKGROUND = (Run("grpo_background", 1, None), Run("grpo_background", 2, "zero3"))
PHASES = ("generation", "update", "checkpoint")


def moment(phase: str, run: Run, draw: np.random.Generator) -> dict[str, Any]:
    """A moment of the phase, as `Job.die` takes it, each as likely as any other."""
    rank = int(draw.integers(run.processes))
    match phase:
        case "generation":
            chunks = 16 // run.processes // MICRO_BATCH
            rollout, chunk, token = draw.integers(ROLLOUTS), draw.integers(chunks), draw.integers(6)
            where = {"rollout": int(rollout), "chunk": int(chunk), "token": int(token)}
        case "update":
            micro_batches = 8 // run.processes // MICRO_BATCH
            where = {"step": int(draw.integers(1, STEPS + 1)), "micro_batch": int(draw.integers(micro_batches + 1))}
        case _:
            step = int(draw.choice(SAVED))
            files = ["weights", "state", "list"] + ["experience"] * (step % ROLLOUT_STEPS > 0)
            where = {"step": step, "file": str(draw.choice(files))}
            if where["file"] != "weights" or run.layout is None:
                rank = 0  # which writes them alone
    return {"during": phase, **where, "rank": rank}


def drawn_kills(count: int, seed: int = 0) -> list[Run]:
    """So many moments of each phase for one process and for two, in layouts that take turns."""
    draw = np.random.default_rng(seed)
    kills = []
    for runs in (ALONE, TOGETHER):
        for place, phase in enumerate(PHASES):
            for number in range(count):
                run = runs[(place + number) % len(runs)]
                kills.append(replace(run, number=number, die=moment(phase, run, draw)))
    return kills


KILLED = [
    *drawn_kills(KILLS_PER_PHASE),
    # Within the passes over a rollout, whose pairs are then read from the checkpoint.
    replace(PAIRS, die={"during": "update", "step": 10, "micro_batch": 0, "rank": 1}),
    # The completions of the third rollout are then those of the first rollout's policy, and stand in the checkpoint of step 8.
    replace(BACKGROUND[1], die={"during": "update", "step": 10, "micro_batch": 0, "rank": 1}),
]
STOPPED_IN_GENERATION = [
    replace(TOGETHER[0], stop={"rollout": 1, "chunk": 1}),
    replace(ALONE[0], stop={"rollout": 2, "chunk": 3}),
]
STOPPED_IN_PASSES = [
    *(replace(TOGETHER[2], stop={"step": 9}), replace(ALONE[1], stop={"step": 17})),
    replace(BACKGROUND[0], stop={"step": 7}),
]
STOPPED = STOPPED_IN_GENERATION + STOPPED_IN_PASSES


def without_before(folder: Path) -> None:
    state = json.loads((folder / "slipway.json").read_bytes())
    del state["before"]
    (folder / "slipway.json").write_text(json.dumps(state))


def optimizer_of_another_rank(folder: Path) -> None:
    torch.save([1, 2], next(folder.rglob("*rank_1_*optim_states.pt")))


DAMAGED: list[tuple[Run, int, Callable[[Path], None], str]] = [
    (STOPPED_IN_PASSES[1], 16, without_before, "slipway.json is not what training writes (KeyError)"),
    (
        STOPPED_IN_PASSES[1],
        16,
        lambda folder: np.savez(folder / "experience.npz", ids=[1]),
        "experience.npz is not what",
    ),
    (STOPPED_IN_PASSES[1], 16, lambda folder: (folder / "experience.npz").unlink(), "experience.npz is missing"),
    (STOPPED_IN_PASSES[2], 4, lambda folder: np.savez(folder / "written.npz", ids=[1]), "written.npz is not what"),
    (STOPPED_IN_PASSES[0], 8, optimizer_of_another_rank, "optim_states.pt is not what training writes"),
    (STOPPED_IN_GENERATION[0], 4, optimizer_of_another_rank, "optim_states.pt is not what training writes"),
]
"""An interrupted run, the checkpoint before its newest, what is done to that, and what is said of it."""
OTHER_PROCESSES = replace(TOGETHER[1], stop={"step": 10})


@dataclass
class World:
    folder: Path
    model: Path
    chats: Path
    saved: dict[str, list[int]] = field(default_factory=dict)
    """Name -> the steps of the checkpoints that the interrupted run said it had written."""


def steps_saved(job: Job) -> list[int]:
    return [line["step"] for line in job.events("progress") if line["what"] == "checkpoint"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("on_policy_resume")
    tokenizer = make_tokenizer()
    world = World(folder, write_policy(folder / "model", tokenizer), write_chats(folder / "chats"))
    interrupted = [*KILLED, *STOPPED, OTHER_PROCESSES]
    wholes = list(dict.fromkeys(run.whole for run in interrupted))
    first = [run.job(world, die=run.die or None, stop=run.stop or None) for run in interrupted]
    jobs = [*first, *(run.job(world) for run in wholes)]
    run_forked(folder, jobs, timeout_seconds=60 + 60 * len(jobs))
    for run in interrupted:
        world.saved[run.name] = steps_saved(run.job(world))
    again = [run.job(world) for run in interrupted[:-1]] + [damaged(world, index) for index in range(len(DAMAGED))]
    run_forked(folder, [*again, OTHER_PROCESSES.job(world, processes=1)], timeout_seconds=60 + 60 * len(interrupted))
    return world


def damaged(world: World, index: int) -> Job:
    """A copy of an interrupted job whose newest checkpoint looks whole, and is not what training writes."""
    run, _, damage, _ = DAMAGED[index]
    job = run.job(world, work=world.folder / f"damaged-{index}")
    shutil.copytree(run.job(world).work, job.work)
    checkpoints = Checkpoints(job.work / "checkpoints")
    step = checkpoints.newest().step
    damage(checkpoints.path(step))
    (checkpoints.path(step) / "complete.json").unlink()
    checkpoints.complete(step)
    return job


def without_times(job: Job, event: str) -> list[dict[str, Any]]:
    def timed(name: str) -> bool:
        return name == "time" or name.endswith(("seconds", "per_second"))

    return [{name: value for name, value in line.items() if not timed(name)} for line in job.events(event)]


def assert_same_end(job: Job, reference: Job) -> None:
    assert list_files(job.work / "out") == list_files(reference.work / "out")
    assert job.result() == reference.result()
    for event in ("step", "rollout", "heldout"):
        assert without_times(job, event) == without_times(reference, event)


@pytest.mark.parametrize("run", KILLED, ids=lambda run: run.name)
def test_killed_and_started_again(world: World, run: Run) -> None:
    """It goes on from the last checkpoint that was finished, if there was one, and not from the one it died in."""
    job = run.job(world)
    saved = world.saved[run.name]
    assert [line["step"] for line in job.events("resume")] == saved[-1:]
    before = run.die["rollout"] * ROLLOUT_STEPS + 1 if run.die["during"] == "generation" else run.die["step"]
    assert saved == [step for step in SAVED if step < before]
    assert_same_end(job, run.whole.job(world))


@pytest.mark.parametrize("run", STOPPED_IN_GENERATION, ids=lambda run: run.name)
def test_asked_to_stop_while_completions_are_written(world: World, run: Run) -> None:
    """What was written of the rollout is given up; the checkpoint is that of the end of the rollout before, 6 or 12."""
    end = run.stop["rollout"] * ROLLOUT_STEPS
    job = run.job(world)
    assert (job.work / "preempted").read_text() == f"at step {end} of {STEPS}"
    assert world.saved[run.name][-1] == end
    (receipt,) = job.events("resume")
    assert receipt["step"] == end and "completions of the rollout" not in receipt["restored"]
    assert_same_end(job, run.whole.job(world))


@pytest.mark.parametrize("run", STOPPED_IN_PASSES, ids=lambda run: run.name)
def test_asked_to_stop_within_the_passes_over_a_rollout(world: World, run: Run) -> None:
    """The step that is being taken is saved with the completions that are being learned from."""
    job = run.job(world)
    assert (job.work / "preempted").read_text() == f"at step {run.stop['step']} of {STEPS}"
    assert world.saved[run.name][-1] == run.stop["step"]
    (receipt,) = job.events("resume")
    assert receipt["step"] == run.stop["step"] and "completions of the rollout" in receipt["restored"]
    assert_same_end(job, run.whole.job(world))


@pytest.mark.parametrize("index", range(len(DAMAGED)))
def test_a_checkpoint_that_is_not_what_training_writes_is_passed_over(world: World, index: int) -> None:
    """By all processes, also where only one of them reads what is wrong."""
    run, before, _, reason = DAMAGED[index]
    job = run.job(world, work=world.folder / f"damaged-{index}")
    assert [line["step"] for line in job.events("resume")] == [before]
    (note,) = (line["text"] for line in job.events("note") if "not resumed from" in line["text"])
    assert note.startswith(f"checkpoint-{world.saved[run.name][-1]} is not resumed from: ") and reason in note
    assert_same_end(job, run.whole.job(world))


def test_another_number_of_processes_without_deepspeed(world: World) -> None:
    """Stopped with two processes, finished by one: the same completions, and losses that differ in the last bits."""
    job, reference = OTHER_PROCESSES.job(world), OTHER_PROCESSES.whole.job(world)
    assert [line["step"] for line in job.events("resume")] == [10]
    rollouts, expected = job.events("rollout"), reference.events("rollout")
    assert [line["reward"] for line in rollouts] == [line["reward"] for line in expected]
    assert job.losses() == pytest.approx(reference.losses(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("run", [*ALONE, *TOGETHER, PAIRS], ids=lambda run: run.name)
def test_what_is_restored_changes_on_the_way(world: World, run: Run) -> None:
    """A run in which it stood still would end alike with whatever was restored."""
    job = run.job(world)
    if not job.work.exists():
        pytest.skip("none of the moments drawn is in a run of this kind")
    rollouts, steps = job.events("rollout"), job.events("step")
    assert len(steps) == STEPS and len(rollouts) == ROLLOUTS
    assert len({line["learning_rate"] for line in steps}) == STEPS
    assert len({line["reward"] for line in rollouts}) == ROLLOUTS
    # Moments of all rewards so far: those of the rollout alone would give a mean of 0 every time. Ranks need none.
    normalized = bool(PARAMS[run.params]["normalize_rewards"])
    assert [not normalized or abs(line["reward_trained_on"]) > 1e-3 for line in rollouts] == [
        not normalized,
        True,
        True,
    ]
    assert len({line["kl_coefficient"] for line in rollouts}) == (ROLLOUTS if run.params.startswith("ppo") else 1)
    assert [line["step"] for line in job.events("heldout")] == [0, 2 * ROLLOUT_STEPS, STEPS]
