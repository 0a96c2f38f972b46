"""Episodes of several turns: killed within a later turn and started again, in one process or two, and where no turn is followed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_on_policy_resume import assert_same_end, without_times
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import write_policy

pytestmark = pytest.mark.slow

SOURCE = """\
import os


def step(completion, turns, prompt):
    print("called", len(turns), "after", prompt[-1]["content"])
    if "a" in completion:
        raise ValueError("there is an a")
    if "o" in completion:
        os._exit(5)
    return None if len(completion) % 5 == 0 else f"n{len(completion) % 7}"


def silent(completion):
    return None


def worth(completion, turns, num_tokens, ended):
    return 0.1 * num_tokens + ended + len(turns) + 0.01 * len(completion)
"""
ROLLOUTS = 2
PARAMS: dict[str, Any] = {
    "rewards": [
        {"kind": "format", "parts": ["e"], "must_end": True, "partial_credit": True},
        {"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1},
    ],
    "completions_per_prompt": 4,
    "rollouts": ROLLOUTS,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "max_prompt_tokens": 40,
    "max_new_tokens": 30,
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "heldout_prompts": 5,
    "journal_samples": 16,
}
"""Each rollout has two steps; checkpoints lie after each."""
IN_A_LATER_TURN = {"during": "generation", "rollout": 1, "chunk": 16 // 4, "token": 1, "rank": 0}
"""One process writes the first turns of 16 episodes in 4 batches: the fifth is the first of the second turns."""
IN_THE_PASSES = {"during": "update", "step": 4, "micro_batch": 0, "rank": 0}


@dataclass
class World:
    folder: Path
    inputs: dict[str, Path]

    def job(self, name: str, function: str | None = "step", *, on_error: str | None = "failed", **more: Any) -> Job:
        path = str(self.folder / "tools.py")
        params = {**PARAMS, "rewards": list(PARAMS["rewards"])}
        if function is not None:
            params["episodes"] = {
                "path": path,
                "function": function,
                "max_turns": 3,
                "role": "user",
                "max_observation_tokens": 6,
                "on_error": on_error,
            }
        if function == "step":
            params["rewards"].append({"kind": "file", "path": path, "function": "worth"})
        resources = {"micro_batch_size": 4, "save_every_steps": 1, "log_every_steps": 1}
        return Job(
            self.folder / name.replace(" ", "_"), "stages.alignment.grpo", params, self.inputs, resources, **more
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("episodes")
    (folder / "tools.py").write_text(SOURCE)
    inputs = {"model": write_policy(folder / "model", make_tokenizer()), "prompts": write_chats(folder / "chats")}
    world = World(folder, inputs)
    first = [
        world.job("whole"),
        world.job("killed", die=IN_A_LATER_TURN),
        world.job("killed in passes", die=IN_THE_PASSES),
        world.job("by two", processes=2),
        world.job("silent", "silent"),
        world.job("plain", None),
    ]
    run_forked(folder, first, timeout_seconds=900)
    run_forked(folder, [world.job("killed"), world.job("killed in passes")], timeout_seconds=600)
    return world


@pytest.mark.parametrize(("name", "resumed_from"), [("killed", 2), ("killed in passes", 3)])
def test_killed_and_started_again(world: World, name: str, resumed_from: int) -> None:
    job = world.job(name)
    assert [line["step"] for line in job.events("resume")] == [resumed_from]
    assert_same_end(job, world.job("whole"))


def test_episodes_go_on_and_say_how(world: World) -> None:
    """Or all this would hold of a run of single turns. The policy writes nothing behind the end of a turn: what stands there tells turns apart."""
    job = world.job("whole")
    rollouts = job.events("rollout")
    assert len(rollouts) == ROLLOUTS
    for line in rollouts:
        samples = [each["completion"] for each in line["samples"]]
        turns = [1 + len(re.findall(r"(?:<\|end\|>|</s>)<\|user\|>", each)) for each in samples]
        assert len(samples) == 16
        assert line["turns"] == pytest.approx(sum(turns) / 16)
        assert line["episodes_of_max_turns"] == turns.count(3)
        assert line["observation_tokens"] > 0
    assert max(line["turns"] for line in rollouts) > 1
    assert sum(line["episodes_of_max_turns"] for line in rollouts) > 0


def test_troubles_are_counted_and_said(world: World) -> None:
    """Raised, or died: the policy reads `failed`, and the journal's numbers and words are as many."""
    job = world.job("whole")
    said = [note["text"] for note in job.events("note") if note["text"].startswith("episodes: trouble with")]
    counted = [line["errors_episodes"] for line in job.events("rollout")]
    assert sum(counted) > 0
    for count in counted:
        assert not count or any(f"trouble with {int(count)} observations (" in each for each in said)
    assert any("raised" in each or "died" in each for each in said)
    assert any("failed" in each["completion"] for line in job.events("rollout") for each in line["samples"])


def test_the_number_of_processes_changes_nothing(world: World) -> None:
    """Each of two processes unfolds its own half, of other lengths; the episodes are those of one."""
    job, reference = world.job("by two"), world.job("whole")
    for line, other in zip(without_times(job, "rollout"), without_times(reference, "rollout"), strict=True):
        assert line["samples"] == other["samples"]
        names = [
            name for name in other if name.startswith(("turns", "observ", "episodes", "errors", "length", "reward"))
        ]
        assert len(names) > 6
        assert [line[name] for name in names] == pytest.approx([other[name] for name in names])
    assert job.losses() == pytest.approx(reference.losses(), rel=1e-4, abs=1e-6)


def test_an_episode_that_ends_at_once_is_a_completion(world: World) -> None:
    """A function that says None at each call: all weights, and all numbers but those of turns, are those without `episodes`."""
    job, reference = world.job("silent", "silent"), world.job("plain", None)
    assert (job.work / "out/model.safetensors").read_bytes() == (reference.work / "out/model.safetensors").read_bytes()
    for event in ("step", "rollout", "heldout"):
        lines, expected_lines = without_times(job, event), without_times(reference, event)
        assert len(lines) == len(expected_lines) > 0
        for line, expected in zip(lines, expected_lines, strict=True):
            assert {name: line[name] for name in expected} == expected
            prefix = "heldout_" if event == "heldout" else ""
            if event != "step":
                assert line[f"{prefix}turns"] == 1 and line[f"{prefix}observation_tokens"] == 0


def test_a_function_that_fails_in_one_of_two_processes_stops_both(world: World) -> None:
    """Both say why, within seconds: neither waits for the other."""
    strict = world.job("strict", on_error=None, processes=2, may_fail=True)
    output = run_forked(world.folder, [strict], timeout_seconds=600)
    said = [line for line in output.splitlines() if line.startswith("episodes: row ")]
    assert said and all(said.count(line) == 2 for line in said), output
    assert all("there is an a" in line or "its process ended with code 5" in line for line in said)
