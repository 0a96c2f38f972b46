"""Dynamic sampling, killed and started again, and in one process or two: the same groups are left out, and the same end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.test_on_policy_resume import assert_same_end, without_times
from tests.distributed.training_world import Job, make_tokenizer, run_forked, write_chats
from tests.integration.on_policy_world import write_policy

pytestmark = pytest.mark.slow

# A rollout has 16 completions of 8 prompts, and 4 steps; checkpoints lie after steps 3, 6, 9 and 12.
ROLLOUTS, ROLLOUT_STEPS = 3, 4
PARAMS: dict[str, Any] = {
    # Two completions of a prompt often both have an "e", or both none: then the group teaches nothing.
    "rewards": [
        {"kind": "regular_expression", "pattern": "e"},
        {"kind": "length_penalty", "target_tokens": 4, "per_token": 0.25},
    ],
    "dynamic_sampling": {"metric": "regular_expression", "max_num_gen_batches": 6},
    "completions_per_prompt": 2,
    "rollouts": ROLLOUTS,
    "rollout_batch_size": 16,
    "global_batch_size": 8,
    "epochs_per_rollout": 2,
    "max_prompt_tokens": 40,
    "max_new_tokens": 6,
    "learning_rate": 3e-4,
    "schedule": "cosine",
    "warmup_steps": 2,
    "adam_epsilon": 1e-5,
    "clip_ratio_high": 0.28,
    "mask_truncated_completions": True,
    "kl_coefficient": 0.0,
    "heldout_prompts": 4,
    "journal_samples": 16,
}
GSPO = {**PARAMS, "policy_loss": "gspo", "clip_ratio": 0.05, "clip_ratio_high": 0.08}
DR_GRPO = {**PARAMS, "loss_aggregation": "seq_mean_token_sum_norm", "scale_by_deviation": False}
BASELINE = {**PARAMS, "subtract_group_mean": True, "kl_coefficient": 0.1, "kl_estimator": "k2"}
DAPO = ("grpo", PARAMS)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dapo": DAPO,
    "gspo": ("grpo", GSPO),
    "dr_grpo": ("grpo", DR_GRPO),
    "reinforce++": ("reinforce_plus_plus", BASELINE),
}
CHUNKS = 16 // 4
"""Batches of completions that one process writes for a batch of 16."""
DEATHS: dict[str, dict[str, Any]] = {
    "within the second batch": {"during": "generation", "rollout": 1, "chunk": CHUNKS, "token": 1, "rank": 0},
    "in the passes of a later rollout": {"during": "update", "step": 8, "micro_batch": 1, "rank": 0},
    "while completions are saved": {"during": "checkpoint", "step": 6, "file": "experience", "rank": 0},
}
DEATH_OF_TWO = {"during": "generation", "rollout": 2, "chunk": 16 // 2 // 2, "token": 1, "rank": 1}
RESUMED_FROM = {"within the second batch": 3, "in the passes of a later rollout": 6, "while completions are saved": 3}


@dataclass
class World:
    folder: Path
    inputs: dict[str, Path]

    def job(self, name: str, micro_batch_size: int = 4, **more: Any) -> Job:
        kind, params = VARIANTS.get(name.partition(" ")[0], DAPO)
        resources = {"micro_batch_size": micro_batch_size, "save_every_steps": 3, "log_every_steps": 1}
        return Job(
            self.folder / name.replace(" ", "_"), f"stages.alignment.{kind}", params, self.inputs, resources, **more
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("dynamic_sampling")
    tokenizer = make_tokenizer()
    inputs = {"model": write_policy(folder / "model", tokenizer), "prompts": write_chats(folder / "chats")}
    world = World(folder, inputs)
    killed = [world.job(name, die=die) for name, die in DEATHS.items()]
    by_two = world.job("both killed", die=DEATH_OF_TWO, **SPREAD["by two"])
    stopped = world.job("stopped", stop={"rollout": 2, "chunk": CHUNKS})
    spread = [world.job(f"{name} {how}", **options) for name in VARIANTS for how, options in SPREAD.items()]
    run_forked(folder, [*killed, by_two, stopped, *spread])
    again = [world.job(name) for name in (*DEATHS, "stopped")]
    run_forked(folder, [*again, world.job("both killed", **SPREAD["by two"])])
    return world


SPREAD: dict[str, dict[str, Any]] = {
    "whole": {},
    "one by one": {"micro_batch_size": 1},
    "by two": {"processes": 2, "micro_batch_size": 2},
}


@pytest.mark.parametrize("name", DEATHS)
def test_killed_and_started_again(world: World, name: str) -> None:
    job = world.job(name)
    assert [line["step"] for line in job.events("resume")] == [RESUMED_FROM[name]]
    assert_same_end(job, world.job("dapo whole"))


def test_two_processes_killed_and_started_again(world: World) -> None:
    """One of them died within the second batch of the last rollout, and the other ended with it."""
    job = world.job("both killed")
    assert [line["step"] for line in job.events("resume")] == [6]
    assert_same_end(job, world.job("dapo by two"))


def test_stopped_while_others_are_drawn(world: World) -> None:
    """What was written of the rollout is given up; the next one begins at the prompt at which it had begun."""
    job = world.job("stopped")
    assert (job.work / "preempted").read_text() == f"at step 8 of {ROLLOUTS * ROLLOUT_STEPS}"
    assert_same_end(job, world.job("dapo whole"))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("how", ["one by one", "by two"])
def test_numbers_do_not_depend_on_how_a_step_is_spread(world: World, how: str, name: str) -> None:
    job, reference = world.job(f"{name} {how}"), world.job(f"{name} whole")
    for event in ("step", "rollout", "heldout"):
        lines, expected = without_times(job, event), without_times(reference, event)
        assert len(lines) == len(expected) > 0
        for line, other in zip(lines, expected, strict=True):
            for number, value in other.items():
                if isinstance(value, int | float) and not number.startswith("generator"):
                    assert line[number] == pytest.approx(value, rel=1e-5, abs=2e-6), number
                elif number == "samples":
                    assert line[number] == value
    found, expected_weights = (load_file(each.work / "out" / "model.safetensors") for each in (job, reference))
    for weight, tensor in found.items():
        assert float((tensor - expected_weights[weight]).abs().max()) < 2e-5, weight


@pytest.mark.parametrize("name", VARIANTS)
def test_groups_were_left_out_and_replaced(world: World, name: str) -> None:
    """Or all this would hold of a run in which nothing had been drawn a second time."""
    job = world.job(f"{name} whole")
    rollouts = job.events("rollout")
    for line in rollouts:
        assert line["groups_drawn"] == 8 + line["groups_left_out"] + line["groups_surplus"]
        assert line["groups_drawn"] == 8 * line["generation_batches"]
        assert line["groups_left_out"] > 0 and line["groups_filled"] == 0
    assert all(line["generation_batches"] > 1 for line in rollouts[1:])
    assert len({line["reward"] for line in rollouts}) == ROLLOUTS
    steps = job.events("step")
    assert all(line["gradient_norm"] > 0.01 for line in steps)
    assert max(line["clipped"] for line in steps) > 0
