"""The grpo and rloo stages on a tiny policy: groups, advantages by hand, and that all three algorithms learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lib.on_policy.experience import Episode
from stages.lib.rows.canonical import read_rows
from tests.integration.on_policy_world import (
    OnPolicyWorld,
    Seen,
    align,
    make_on_policy_world,
    write_prompts,
)

pytestmark = pytest.mark.slow

GROUP = 4
PARAMS: dict[str, Any] = {"completions_per_prompt": GROUP, "kl_coefficient": 0.2, "missing_end_penalty": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnPolicyWorld:
    return make_on_policy_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=["grpo", "rloo"])
def trained(request: pytest.FixtureRequest, world: OnPolicyWorld, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two rollouts of 4 prompts with 4 completions each. In the second the policy is no longer its reference."""
    return align(request.param, world.inputs, tmp_path_factory.mktemp(request.param), PARAMS)


def scores_of(found: list[Episode]) -> np.ndarray:
    """The sum of both rewards, less 0.5 for a completion that was cut off."""
    return np.array([each.rewards.sum() - 0.5 * (not each.ended) for each in found])


def test_completions_of_a_prompt_stand_together_and_differ(trained: Seen) -> None:
    for experience in trained.experiences:
        groups = [experience.episodes[start : start + GROUP] for start in range(0, 16, GROUP)]
        for group in groups:
            assert len({each.row_index for each in group}) == 1
            assert len({each.prompt_ids.tobytes() for each in group}) == 1
            assert len({each.ids.tobytes() for each in group}) > 1
        assert len({group[0].row_index for group in groups}) == 4


def test_advantages_by_hand(trained: Seen) -> None:
    """grpo: (score - mean of the group) / (deviation + 1e-4), the deviation with 4 - 1 in the denominator.

    rloo: score - 0.2 sum(log pi - log ref), less the mean of the three others. Either is the same for all tokens of a
    completion.
    """
    for experience in trained.experiences:
        found = list(experience.episodes)
        scores = scores_of(found)
        if trained.parts.engine.ctx.work.name.startswith("rloo"):
            scores = scores - 0.2 * np.array(
                [(each.logprobs.astype(np.float64) - each.ref_logprobs).sum() for each in found]
            )
            others = [
                np.delete(scores[start : start + GROUP], place).mean()
                for start in range(0, 16, GROUP)
                for place in range(GROUP)
            ]
            expected = scores - others
        else:
            groups = scores.reshape(-1, GROUP)
            centered = groups - groups.mean(axis=1, keepdims=True)
            expected = (centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)).ravel()
        for each, advantage in zip(found, expected, strict=True):
            assert each.advantages.tolist() == pytest.approx([advantage] * len(each.ids), abs=1e-5)
        assert np.abs(expected).max() > 0.1


def test_there_is_no_critic(trained: Seen) -> None:
    line = trained.lines("rollout")[0]
    assert not {"value_loss", "explained_variance", "value_mean"} & set(line)
    assert trained.parts.module.value is None
    assert not (trained.context.out / "value").exists()
    assert all(not each.values.any() and not each.returns.any() for each in trained.experiences[1].episodes)


def test_the_penalty_is_part_of_the_loss_or_of_the_reward(trained: Seen) -> None:
    """grpo: loss = policy loss + 0.2 x mean k3, which is 0 only where the policy still is its reference. rloo: no such term."""
    steps = trained.lines("step")
    if "kl_loss" not in steps[0]:
        assert trained.parts.engine.ctx.work.name.startswith("rloo")
        assert all(step["loss"] == pytest.approx(step["policy_loss"], abs=1e-6) for step in steps)
        return
    assert trained.parts.engine.ctx.work.name.startswith("grpo")
    for step in steps:
        assert step["loss"] == pytest.approx(step["policy_loss"] + 0.2 * step["kl_loss"], abs=1e-6)
    assert steps[0]["kl_loss"] < 1e-9 and all(step["kl_loss"] > 1e-4 for step in steps[1:])


def test_groups_that_teach_nothing_are_counted(world: OnPolicyWorld, tmp_path: Path) -> None:
    """With a reward that is 0 for all, all of them: no advantage and, without a KL term, no gradient."""
    nothing = [{"kind": "length_penalty", "target_tokens": 100, "per_token": 1.0}]
    changes = {"rewards": nothing, "kl_coefficient": 0, "rollouts": 1, "completions_per_prompt": GROUP}
    seen = align("grpo", world.inputs, tmp_path, changes)
    (line,) = seen.lines("rollout")
    assert line["groups_without_signal"] == 1.0
    assert line["gradient_norm"] == 0 == line["advantage_deviation"]
    assert seen.parts.reference is None, "nothing holds the policy to one, so none is loaded"
    assert line["kl"] == 0


def test_without_scaling_advantages_are_differences(world: OnPolicyWorld, tmp_path: Path) -> None:
    changes = {**PARAMS, "rollouts": 1, "scale_by_deviation": False}
    seen = align("grpo", world.inputs, tmp_path, changes)
    groups = scores_of(seen.experiences[0].episodes).reshape(-1, GROUP)
    expected = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    found = [float(each.advantages[0]) for each in seen.experiences[0].episodes]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ppo", {}),
        ("grpo", {}),
        ("rloo", {}),
        ("reinforce_plus_plus", {}),
        ("reinforce_plus_plus", {"subtract_group_mean": True, "completions_per_prompt": GROUP, "kl_estimator": "k2"}),
        ("grpo", {"loss_aggregation": "seq_mean_token_sum_norm", "scale_by_deviation": False}),
        ("grpo", {"policy_loss": "gspo", "clip_ratio": 0.2}),
        ("grpo", {"policy_loss": "cispo", "clip_ratio_high": 4.0}),
        ("grpo", {"policy_loss": "sapo"}),
        ("grpo", {"dynamic_sampling": {}, "clip_ratio_high": 0.28}),
        ("online_dpo", {}),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each.values())),
)
def test_it_learns_what_is_rewarded(kind: str, more: dict[str, Any], world: OnPolicyWorld, tmp_path: Path) -> None:
    """To be brief: -0.1 for each token but the first. Better than the policy it began with by four standard errors."""
    rows = list(read_rows(world.chats / "train.jsonl"))
    prompts = write_prompts(tmp_path / "prompts", rows, rows)
    changes = {
        "rewards": [{"kind": "length_penalty", "target_tokens": 1, "per_token": 0.1}],
        "rollouts": 6,
        "epochs_per_rollout": 4,
        "learning_rate": 1e-3,
        "kl_coefficient": 0.01,
        "heldout_prompts": 64,
        "evaluate_every_rollouts": 4,
        **more,
    }
    seen = align(kind, {"model": world.model, "prompts": prompts}, tmp_path / "run", changes)
    metrics = seen.result.metrics
    error = metrics["heldout_reward_deviation_base"] / seen.result.facts.heldout_rows**0.5
    assert metrics["heldout_reward"] > metrics["heldout_reward_base"] + 4 * error
    assert metrics["heldout_length_tokens"] < metrics["heldout_length_tokens_base"] - 1
    assert metrics["heldout_kl"] > 1, "at the price of a divergence from the reference"
    # A step of online_dpo takes as many pairs as those of the others take completions.
    steps = [0, 16, 24] if kind == "online_dpo" else [0, 32, 48]
    assert [line["step"] for line in seen.lines("heldout")] == steps, "before rollouts 1 and 5, and at the end"
