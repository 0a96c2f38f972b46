"""Tokens that a policy only read, between two turns of an episode, teach nothing: by hand, and against the turns without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.formulas import policy_gradient as pg
from stages.lib.on_policy.experience import PER_TOKEN, Episode, Experience, collate_episodes
from stages.lib.on_policy.learning import Learner
from tests.numerics.test_on_policy_loss import NUM_TOKENS, PADDING, grpo, ppo, two_episodes

OBSERVATION = [3, 3, 2]
"""Read behind the first token of the first completion, which was 2, 3, 1: 2, (3, 3, 2), 3, 1."""
IDS = [2, *OBSERVATION, 3, 1]
SAID = [1, 0, 0, 0, 1, 1]


def with_observation() -> Experience:
    """The first of `two_episodes` with an observation in it, of whose tokens nothing is known: 0."""
    first, second = two_episodes().episodes

    def spread(numbers: Any) -> np.ndarray:
        found = np.zeros(len(IDS), dtype=np.float32)
        found[np.array(SAID, dtype=bool)] = numbers
        return found

    fields: dict[str, Any] = {name: spread(getattr(first, name)) for name in PER_TOKEN}
    read = replace(first, ids=np.array(IDS), observed=np.array(SAID) == 0, **fields)
    return Experience([read, second])


def loss_by_logits(learner: Learner, experience: Experience) -> tuple[float, torch.Tensor, dict[str, float]]:
    """The loss, its gradient with regard to the policy's logits, B x T x V, and what is logged."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output.logits.retain_grad()
        kept.append(output.logits)

    handle = learner.parts.module.policy.register_forward_hook(keep)
    totals: dict[str, float] = {}
    loss = learner.loss(collate_episodes(experience.episodes, PADDING), NUM_TOKENS, totals)
    loss.backward()
    handle.remove()
    assert kept[0].grad is not None
    return float(loss.detach()), kept[0].grad, totals


@pytest.mark.parametrize("make", [ppo, grpo])
@pytest.mark.parametrize("more", [{}, {"entropy_coefficient": 0.01, "mismatch_cap": 3.0}], ids=["plain", "all terms"])
def test_what_was_read_carries_no_loss(make: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """Prompts have 1 and 3 tokens and are padded to 3: the logits that tokens were drawn from begin at place 2.

    Those of the three observed tokens, at 3, 4 and 5, and those behind the end have a gradient of exactly 0, and all the
    policy's own have one.
    """
    learner = make(tmp_path, more=more)
    _, gradient_BTV, _ = loss_by_logits(learner, with_observation())
    taught = gradient_BTV.abs().sum(-1).bool().tolist()
    own = [False, False, *(said == 1 for said in SAID), False]
    assert all(not found for found, mine in zip(taught[0], own, strict=True) if not mine)
    assert any(found for found, mine in zip(taught[0], own, strict=True) if mine)
    assert taught[1] == [False, False, True] + [False] * 6


@pytest.mark.parametrize("make", [ppo, grpo])
def test_the_loss_is_that_of_a_mask_by_hand(make: Any, tmp_path: Path) -> None:
    """The same batch with all seven tokens of completions in it, and the mask put over it by hand afterwards."""
    experience = with_observation()
    loss, _, totals = loss_by_logits(make(tmp_path), experience)
    whole = [replace(each, observed=np.zeros(0, dtype=np.bool_)) for each in experience.episodes]
    by_hand = collate_episodes(whole, PADDING)
    assert by_hand["mask"].tolist() == [[1] * 6, [1] + [0] * 5]
    by_hand["mask"][0] = torch.tensor(SAID).float()
    learner = make(tmp_path)
    expected_totals: dict[str, float] = {}
    expected = learner.loss(by_hand, NUM_TOKENS, expected_totals)
    assert loss == float(expected.detach())
    assert {name: float(value) for name, value in totals.items()} == {
        name: float(value) for name, value in expected_totals.items()
    }
    batch = collate_episodes(experience.episodes, PADDING)
    assert batch["mask"].tolist() == by_hand["mask"].tolist()
    assert batch["attention_mask"].tolist() == by_hand["attention_mask"].tolist()


def test_only_what_the_policy_wrote_is_counted(tmp_path: Path) -> None:
    experience = with_observation()
    learner = grpo(tmp_path)
    assert [learner.learned_tokens(each) for each in experience.episodes] == [3, 1]
    assert experience.lengths.tolist() == [3, 1]
    assert experience.mask.tolist() == [SAID, [1, 0, 0, 0, 0, 0]]


def test_observations_are_written_and_read(tmp_path: Path) -> None:
    experience = with_observation()
    experience.save(tmp_path / "experience.npz")
    first, second = Experience.load(tmp_path / "experience.npz").episodes
    assert first.observed.tolist() == [not said for said in SAID] and first.ids.tolist() == IDS
    assert second.observed.tolist() == [] and second.num_said == 1


def squeezed(values_NK: torch.Tensor, mask_NK: torch.Tensor) -> torch.Tensor:
    """The values within the mask, one after the other; each row has as many."""
    return values_NK[mask_NK.bool()].view(len(values_NK), -1)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_pass_over_what_was_read(gamma: float) -> None:
    """Rewards and generalized advantages are those of the same tokens without any between them; outside they are 0."""
    generator = torch.Generator().manual_seed(3)
    mask_NK = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1]]).double()
    kl_NK, values_NK = (torch.randn(2, 8, generator=generator).double() for _ in range(2))
    scores_N = torch.tensor([2.0, -1.0]).double()
    rewards_NK = pg.token_rewards(scores_N, kl_NK, mask_NK, kl_coefficient=0.1)
    assert (rewards_NK[:, -2:] + 0.1 * kl_NK[:, -2:] * mask_NK[:, -2:]).tolist() == [
        [pytest.approx(2.0), 0.0],
        [0.0, pytest.approx(-1.0)],
    ]
    found = pg.generalized_advantages(rewards_NK, values_NK, mask_NK, gamma=gamma, lam=0.95)
    alone_NK = torch.ones(2, 4).double()
    alone = pg.token_rewards(scores_N, squeezed(kl_NK, mask_NK), alone_NK, kl_coefficient=0.1)
    expected = pg.generalized_advantages(alone, squeezed(values_NK, mask_NK), alone_NK, gamma=gamma, lam=0.95)
    for each_NK, expected_NK in zip(found, expected, strict=True):
        assert torch.equal(squeezed(each_NK, mask_NK), expected_NK)
        assert float((each_NK * (1 - mask_NK)).abs().sum()) == 0


def test_an_episode_knows_what_it_says() -> None:
    """Without observations all of it."""
    first: Episode = two_episodes().episodes[0]
    assert first.said.tolist() == [1, 1, 1] and first.num_said == 3
