"""A reward of the user's own file in training: killed and started again, in one process or two, the same end; troubles counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_on_policy_resume import assert_same_end, without_times
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import write_policy

pytestmark = pytest.mark.slow

SOURCE = """\
import os, random


def reward(completion, ended, num_tokens):
    print("scored", len(completion))
    if "a" in completion:
        raise ValueError("there is an a")
    if "o" in completion:
        os._exit(5)
    return 0.1 * num_tokens + ended + 0.01 * random.random()
"""
STRICT = SOURCE.replace("os._exit(5)", "return float('nan')")
ROLLOUTS = 2
PARAMS: dict[str, Any] = {
    "completions_per_prompt": 4,
    "rollouts": ROLLOUTS,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "max_prompt_tokens": 40,
    "max_new_tokens": 6,
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "heldout_prompts": 4,
    "journal_samples": 16,
}
"""Each rollout has two steps; checkpoints lie after each."""


@dataclass
class World:
    folder: Path
    inputs: dict[str, Path]

    def job(self, name: str, *, on_error: float | None = -1.0, **more: Any) -> Job:
        reward = {"kind": "file", "path": str(self.folder / "rewards.py"), "function": "reward", "on_error": on_error}
        if on_error is None:
            reward["path"] = str(self.folder / "strict.py")
        params = {**PARAMS, "rewards": [reward, {"kind": "format", "parts": ["e"], "weight": 0.1}]}
        resources = {"micro_batch_size": 4, "save_every_steps": 1, "log_every_steps": 1}
        return Job(
            self.folder / name.replace(" ", "_"), "stages.alignment.grpo", params, self.inputs, resources, **more
        )


DEATH = {"during": "update", "step": 4, "micro_batch": 0, "rank": 0}
"""In the second rollout, whose completions are in the checkpoint of step 3, with their rewards."""
ASKED = {"during": "scoring", "scored": 1, "asked": 2}
"""One of two processes is, while it scores its completions of the second rollout: it is asked before the user's file runs, and then
with each answer, of which several may come at once.
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("contained")
    (folder / "rewards.py").write_text(SOURCE)
    (folder / "strict.py").write_text(STRICT)
    inputs = {"model": write_policy(folder / "model", make_tokenizer()), "prompts": write_chats(folder / "chats")}
    world = World(folder, inputs)
    stopped = world.job("stopped", stop=ASKED, processes=2)
    first = [world.job("whole"), world.job("killed", die=DEATH), world.job("by two", processes=2), stopped]
    run_forked(folder, first)
    assert (stopped.work / "preempted").is_file() and not stopped.events("resume")
    run_forked(folder, [world.job("killed"), world.job("stopped", processes=2)])
    return world


def test_killed_and_started_again(world: World) -> None:
    job = world.job("killed")
    assert [line["step"] for line in job.events("resume")] == [3]
    assert_same_end(job, world.job("whole"))


def test_stopped_by_one_process_while_it_scores(world: World) -> None:
    """The other has scored its own by then, or waits: both end together, and go on from what was saved."""
    assert_same_end(world.job("stopped"), world.job("by two"))


def test_troubles_are_counted_and_said(world: World) -> None:
    """What is written is read again: each completion with an a or an o has -1, and so it stands in the journal's numbers."""
    job = world.job("whole")
    rollouts = job.events("rollout")
    assert len(rollouts) == ROLLOUTS
    assert sum(line["errors_file"] for line in rollouts) > 0
    for number, line in enumerate(rollouts, start=1):
        wrong = [each for each in line["samples"] if {"a", "o"} & set(each["completion"])]
        assert (len(line["samples"]), len(wrong)) == (16, line["errors_file"])
        assert "errors_format" not in line
        died = sum("a" not in each["completion"] for each in wrong)
        words = {"raised": len(wrong) - died, "died": died}
        said = [note["text"] for note in job.events("note") if note["text"].startswith("rewards.file: trouble with")]
        assert any(f"trouble with {len(wrong)} of 16 completions" in each for each in said) == bool(wrong), number
        assert any(all(f"{count} {word}" in each for word, count in words.items() if count) for each in said)


def test_the_number_of_processes_changes_nothing(world: World) -> None:
    """Each of two processes scores its own half; completions, rewards and troubles are those of one."""
    job, reference = world.job("by two"), world.job("whole")
    for line, other in zip(without_times(job, "rollout"), without_times(reference, "rollout"), strict=True):
        assert line["samples"] == other["samples"]
        assert [line[name] for name in ("errors_file", "reward_file", "reward_format")] == pytest.approx(
            [other[name] for name in ("errors_file", "reward_file", "reward_format")]
        )


def test_a_function_that_fails_in_one_of_two_processes_stops_both(world: World) -> None:
    """Both say why, within seconds: neither waits for the other."""
    output = run_forked(
        world.folder, [world.job("strict", on_error=None, processes=2, may_fail=True)], timeout_seconds=200
    )
    said = [line for line in output.splitlines() if line.startswith("rewards.file: row ")]
    assert said and all(said.count(line) == 2 for line in said), output
    assert all("there is an a" in line or "it gave nan" in line for line in said)
