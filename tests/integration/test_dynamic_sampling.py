"""Dynamic sampling in whole runs of grpo and rloo: what is learned from, and where the next rollout begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.on_policy_world import OnPolicyWorld, align, make_on_policy_world

pytestmark = pytest.mark.slow

ANSWER = {"kind": "regular_expression", "pattern": "e"}
CHANGES: dict[str, Any] = {"rewards": [ANSWER], "completions_per_prompt": 2, "kl_coefficient": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_every_group_teaches_something(kind: str, world: OnPolicyWorld, tmp_path: Path) -> None:
    """The first rollout keeps those of the groups of a run without it, completion by completion, that score differently."""
    seen = align(kind, world.inputs, tmp_path / "with", {**CHANGES, "dynamic_sampling": {}})
    plain = align(kind, world.inputs, tmp_path / "without", CHANGES)
    lines = seen.lines("rollout")
    begin = 0
    for experience, line in zip(seen.experiences, lines, strict=True):
        positions = [each.position for each in experience.episodes]
        rewards = experience.rewards.sum(dim=1).view(-1, 2)
        assert (rewards[:, 0] != rewards[:, 1]).all()
        assert positions == sorted(set(positions)) and len(positions) == 16
        end = begin + 2 * int(line["groups_drawn"])
        assert begin <= positions[0] and positions[-1] < end
        begin = end
        assert line["reward"] == 0.5, "one of two completions has it in every group"
        assert 0 < line["reward_drawn"] < 1
    assert begin > 32
    usual = {each.position: each for each in plain.experiences[0].episodes}
    differ = [p for p in range(0, 16, 2) if usual[p].rewards.sum() != usual[p + 1].rewards.sum()]
    kept = {each.position: each for each in seen.experiences[0].episodes}
    assert [p for p in kept if p < 16 and p % 2 == 0] == differ and 0 < len(differ) < 8
    for position in differ:
        assert np.array_equal(kept[position].ids, usual[position].ids)
    assert "train_reward_drawn" in seen.result.metrics


def test_a_policy_that_has_nothing_to_learn(world: OnPolicyWorld, tmp_path: Path) -> None:
    """All completions are worth 0: the bound ends it, the rollouts have their size, and the journal says so of each."""
    nothing = [{"kind": "length_penalty", "target_tokens": 100, "per_token": 1.0}]
    changes = {**CHANGES, "rewards": nothing, "dynamic_sampling": {"max_num_gen_batches": 2}}
    seen = align("grpo", world.inputs, tmp_path, changes)
    notes = [line["text"] for line in seen.lines("note") if "0 of 16 groups score differently" in line["text"]]
    assert len(notes) == 2 and notes[0].startswith("rollout 1: ")
    assert [line["groups_filled"] for line in seen.lines("rollout")] == [8, 8]
    assert [len(experience) for experience in seen.experiences] == [16, 16]
    assert [experience.episodes[0].position for experience in seen.experiences] == [0, 32]
    assert all(line["gradient_norm"] == 0 for line in seen.lines("step"))


def test_completions_that_are_left_out_of_the_loss_are_counted(world: OnPolicyWorld, tmp_path: Path) -> None:
    seen = align("grpo", world.inputs, tmp_path, {**CHANGES, "mask_truncated_completions": True, "rollouts": 1})
    (line,) = seen.lines("rollout")
    assert line["completions_left_out"] == round(16 * (1 - line["ended"])) > 0
