"""Dynamic sampling: which groups are learned from, by hand, and what a recipe may say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.lib.on_policy.dynamic_sampling import Drawn, draw_groups
from stages.lib.on_policy.experience import Experience
from stages.lib.on_policy.params import DynamicSamplingParams
from tests.unit.test_experience import episode
from tests.unit.test_policy_loss_params import accepted, read

NAMES = ["exact_match", "length_penalty"]


def draw(rewards: Sequence[tuple[float, float]], first: int = 0, **options: Any) -> tuple[Drawn, list[list[int]]]:
    """What a rollout of four completions in groups of two learns from, and which positions were asked for.

    `rewards`: the two rewards of the completion at each position, which has as many tokens as its position has units.
    """
    params = accepted(rollout_batch_size=4, global_batch_size=2, completions_per_prompt=2)
    asked: list[list[int]] = []

    def complete(positions: Sequence[int]) -> Experience:
        asked.append(list(positions))
        return Experience([replace(episode(p, 1, 1 + p % 3), rewards=np.array(rewards[p])) for p in positions])

    def scores_of(experience: Experience) -> Tensor:
        return experience.rewards.sum(dim=1).to(torch.float64)

    return draw_groups(params, DynamicSamplingParams(**options), first, complete, scores_of, NAMES), asked


def positions(drawn: Drawn) -> list[int]:
    return [each.position for each in drawn.experience.episodes]


WRONG, RIGHT = (0.0, 0.0), (1.0, 0.0)


def test_groups_that_score_alike_are_replaced_by_hand() -> None:
    """Groups by their scores: (0, 1), (1, 1); then (0, 0), (1, 0); two are wanted. The first and the fourth teach something.

    Eight completions of 1, 2, 3, 1, 2, 3, 1, 2 tokens were written, four of them right.
    """
    drawn, asked = draw([WRONG, RIGHT, RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG])
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert positions(drawn) == [0, 1, 6, 7]
    assert (drawn.num_completions, drawn.num_tokens, drawn.note) == (8, 15, "")
    assert drawn.logged == {
        "generation_batches": 2,
        "groups_drawn": 4,
        "groups_left_out": 2,
        "groups_surplus": 0,
        "groups_filled": 0,
        "reward_drawn": 4 / 8,
    }


def test_what_is_more_than_is_wanted_is_left_out() -> None:
    """(0, 0), (0, 1); then (1, 0), (0, 1): three groups teach something, and the last of them is one too many."""
    drawn, _ = draw([WRONG, WRONG, WRONG, RIGHT, RIGHT, WRONG, WRONG, RIGHT])
    assert positions(drawn) == [2, 3, 4, 5]
    assert (drawn.logged["groups_surplus"], drawn.logged["groups_left_out"]) == (1, 1)


def test_nothing_more_is_drawn_than_is_needed() -> None:
    """As without dynamic sampling, where all groups teach something; from the position on that it is to begin at."""
    drawn, asked = draw([WRONG] * 8 + [WRONG, RIGHT, RIGHT, WRONG], first=8)
    assert asked == [[8, 9, 10, 11]]
    assert positions(drawn) == [8, 9, 10, 11]
    assert drawn.num_completions == 4


def test_a_bound_that_is_reached_is_said() -> None:
    """Of six groups only the third teaches something: the first of the others makes up the number."""
    drawn, asked = draw([WRONG] * 4 + [WRONG, RIGHT] + [RIGHT] * 6, max_num_gen_batches=3)
    assert len(asked) == 3
    assert positions(drawn) == [0, 1, 4, 5]
    assert (drawn.logged["groups_filled"], drawn.logged["groups_left_out"]) == (1, 4)
    assert drawn.note.startswith(
        "1 of 6 groups score differently after 3 batches, and 2 are wanted: 1 that teach nothing"
    )
    assert "max_num_gen_batches" in drawn.note
    nothing, _ = draw([RIGHT] * 8, max_num_gen_batches=2)
    assert positions(nothing) == [0, 1, 2, 3] and nothing.logged["groups_filled"] == 2


def test_larger_batches() -> None:
    """Eight completions at a time: one batch is enough, and of its four groups the first two that teach something are kept."""
    drawn, asked = draw([RIGHT, RIGHT, WRONG, RIGHT, RIGHT, WRONG, WRONG, RIGHT], gen_batch_size=8)
    assert asked == [list(range(8))]
    assert positions(drawn) == [2, 3, 4, 5]
    assert drawn.num_completions == 8


def test_what_must_differ() -> None:
    """Two right answers, one of them longer than is wished: they differ in score, not in what `exact_match` says."""
    longer = (1.0, -0.5)
    rewards = [RIGHT, longer, WRONG, RIGHT, RIGHT, WRONG, WRONG, WRONG]
    whole, _ = draw(rewards)
    assert positions(whole) == [0, 1, 2, 3]
    by_one, _ = draw(rewards, metric="exact_match")
    assert positions(by_one) == [2, 3, 4, 5]


REWARDS = [
    {"kind": "exact_match", "column": "answer"},
    {"kind": "length_penalty", "target_tokens": 4, "per_token": 0.1},
]


@pytest.mark.parametrize(
    ("block", "problem", "way_out"),
    [
        (
            {"metric": "exact_mach"},
            "params: dynamic_sampling.metric: there is no reward 'exact_mach' here (Did you mean 'exact_match'?).",
            {"metric": "exact_match"},
        ),
        (
            {"gen_batch_size": 18},
            "params: dynamic_sampling.gen_batch_size 18 is not a multiple of completions_per_prompt 4: take 20.",
            {"gen_batch_size": 20},
        ),
        (
            {"max_num_gen_batches": 1},
            (
                "params: dynamic_sampling draws 16 completions at most, and a rollout learns from 16, so that none could be"
                " left out: take max_num_gen_batches 2 or more."
            ),
            {"max_num_gen_batches": 2},
        ),
        (
            {"max_num_gen_batches": 3, "gen_batch_size": 4},
            (
                "params: dynamic_sampling draws 12 completions at most, and a rollout learns from 16, so that none could be"
                " left out: take max_num_gen_batches 5 or more."
            ),
            {"max_num_gen_batches": 5, "gen_batch_size": 4},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_what_cannot_be_is_refused(
    kind: str, block: Mapping[str, Any], problem: str, way_out: Mapping[str, Any]
) -> None:
    """Rollouts of 16 completions, 4 of each prompt."""
    params, problems = read(kind, rewards=REWARDS, dynamic_sampling=block)
    assert params is None
    assert problems == [problem]
    accepted(kind, rewards=REWARDS, dynamic_sampling=way_out)


def test_it_has_no_part_in_the_identity_of_recipes_without_it() -> None:
    assert "dynamic_sampling" not in accepted().model_dump(mode="json")
    assert accepted(dynamic_sampling={}).model_dump(mode="json")["dynamic_sampling"]["max_num_gen_batches"] == 10


def test_ppo_has_no_groups() -> None:
    params, problems = read("ppo", dynamic_sampling={})
    assert params is None and "dynamic_sampling" in problems[0]
