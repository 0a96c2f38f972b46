"""The loss of online DPO on pairs whose every number can be worked out by hand, and which completions become pairs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.stage import World
from stages.alignment.online_dpo import OnlineDPO, OnlineDPOParams
from stages.lib.formulas.policy_gradient import best_against_worst
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.pair_learning import PairLearner, wins_beyond_rounding
from stages.lib.training.params import Batch
from tests.numerics.test_on_policy_loss import COMMON, PADDING, actor_critic, episode, float32, make_context

BETA = 0.5
SIZES: dict[str, Any] = {"rollout_batch_size": 8, "global_batch_size": 4}
IDS = [[2, 3, 1], [3], [1, 1], [2], [2, 2], [3, 3], [1], [3, 2, 1, 1]]
PROMPTS = [[1], [3, 2, 1], [2], [3, 1]]
SCORES = torch.tensor([1.0, 3.0, 2.0, -2.0, 0.5, 0.5, 1.0, 4.0], dtype=torch.float64)
"""Of four pairs: the second is better, the first is, both are equal, the second is."""
BETTER, WORSE = [1, 2, 7], [0, 3, 6]


def learner_of(folder: Path, *, world: World = World(), **more: Any) -> PairLearner:  # noqa: B008 - frozen
    """What learns from a table (see test_on_policy_loss.py): what follows a token is a row of it."""
    params = OnlineDPOParams(**{**COMMON, **SIZES, "kl_coefficient": BETA, **more})
    module = actor_critic(critic=False)
    parts: Any = SimpleNamespace(
        engine=SimpleNamespace(forward=module, device=torch.device("cpu")),
        padding_id=PADDING,
        module=module,
        to_device=lambda batch: batch,
    )
    return PairLearner(make_context(folder, world, None), params, OnlineDPO(params), parts, Batch(4, 4, 1, 1))


def rollout() -> Experience:
    """Eight completions of four prompts; the reference's log-probabilities of their tokens are drawn."""
    draw = np.random.default_rng(0)
    return Experience(
        [
            episode(place, PROMPTS[place // 2], ids, **dict.fromkeys(("logprobs", "ref_logprobs"), float32(*said)))
            for place, ids in enumerate(IDS)
            for said in [-draw.exponential(size=len(ids))]
        ]
    )


def taught(learner: PairLearner, experience: Experience, scores_N: Tensor = SCORES) -> Experience:
    advantages_NK, returns_NK, _ = learner.algorithm.advantages(experience, scores_N, BETA)
    return learner.taught_by(experience.with_advantages(advantages_NK, returns_NK))


def step_loss(learner: PairLearner, episodes: list[Episode], pairs: float) -> tuple[Tensor, dict[str, Any]]:
    totals: dict[str, Any] = {}
    return learner.loss(learner.collate(episodes), pairs, totals), totals


def log_probability(rows_VV: Tensor, place: int) -> Tensor:
    """Of a completion under the table, token by token."""
    sequence = [*PROMPTS[place // 2], *IDS[place]]
    start = len(PROMPTS[place // 2])
    return sum((rows_VV[before].log_softmax(-1)[now] for before, now in itertools.pairwise(sequence[start - 1 :])), torch.zeros(()))  # fmt: skip


def by_the_formula(rows_VV: Tensor, experience: Experience, loss: str) -> Tensor:
    """TRL's losses over the pairs that are no tie; of ipo on means over tokens, as its trainer on fixed pairs has it."""
    losses = []
    for better, worse in zip(BETTER, WORSE, strict=True):
        ratios = []
        for place in (better, worse):
            ratio = log_probability(rows_VV, place) - float(experience.episodes[place].ref_logprobs.sum())
            ratios.append(ratio / len(IDS[place]) if loss == "ipo" else ratio)
        logit = ratios[0] - ratios[1]
        losses.append(-logsigmoid(BETA * logit) if loss == "sigmoid" else (logit - 1 / (2 * BETA)) ** 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_and_gradient_are_those_of_the_formula(loss: str, tmp_path: Path) -> None:
    learner, experience = learner_of(tmp_path, loss=loss), rollout()
    chosen = taught(learner, experience)
    found, totals = step_loss(learner, chosen.episodes, 3)
    found.backward()
    table = actor_critic(critic=False).policy.rows
    expected = by_the_formula(table, experience, loss)
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    gradient = learner.parts.module.policy.rows.grad
    torch.testing.assert_close(gradient, table.grad, rtol=0, atol=1e-6)
    assert float(gradient.abs().max()) > 0.05
    assert totals["pairs"] == 3 and float(totals["loss"]) == pytest.approx(3 * float(expected.detach()), abs=1e-6)


def test_what_is_logged_of_pairs(tmp_path: Path) -> None:
    """Margins of implicit rewards, how many are won, and by how much log-probabilities changed: means over three pairs."""
    learner, experience = learner_of(tmp_path), rollout()
    episodes = taught(learner, experience).episodes
    _, totals = step_loss(learner, episodes, 3)
    rows = actor_critic(critic=False).policy.rows.detach()
    change = [
        float(log_probability(rows, place)) - float(experience.episodes[place].ref_logprobs.sum()) for place in range(8)
    ]
    better, worse = np.array([change[place] for place in BETTER]), np.array([change[place] for place in WORSE])
    tokens = sum(len(IDS[place]) for place in (*BETTER, *WORSE))
    stats = learner.means({name: float(value) for name, value in totals.items()}, 3, tokens)
    assert learner.counted(episodes) == 3 and sum(map(learner.learned_tokens, episodes)) == tokens == 12
    assert stats["margin"] == pytest.approx(BETA * (better - worse).mean(), abs=1e-5)
    assert stats["accuracy"] == pytest.approx((better > worse).mean())
    assert stats["chosen_logprob_change"] == pytest.approx(better.mean(), abs=1e-5)
    assert stats["rejected_logprob_change"] == pytest.approx(worse.mean(), abs=1e-5)
    assert stats["pairs"] == 3 and 0 < stats["entropy"] < math.log(4)


def test_micro_batches_and_processes_do_not_change_the_loss(tmp_path: Path) -> None:
    """Each process gives its part twice where gradients are averaged over two; a micro batch of nothing but a tie gives 0."""
    learner = learner_of(tmp_path)
    episodes = taught(learner, rollout()).episodes
    whole = float(step_loss(learner, episodes, 3)[0].detach())
    parts = [step_loss(learner, episodes[start : start + 2], 3)[0] for start in range(0, 8, 2)]
    assert sum(float(part.detach()) for part in parts) == pytest.approx(whole, abs=1e-6)
    parts[2].backward()
    assert float(parts[2].detach()) == 0 and not learner.parts.module.policy.rows.grad.any()
    halves = [
        float(step_loss(learner_of(tmp_path, world=World(rank=rank, size=2)), part, 3)[0].detach())
        for rank, part in enumerate((episodes[:4], episodes[4:]))
    ]
    assert sum(halves) / 2 == pytest.approx(whole, abs=1e-6)


def test_the_gradient_reaches_the_tokens_of_pairs_alone(tmp_path: Path) -> None:
    """d L / d log pi is -beta sigmoid(-m) / pairs for every token of the better completion, its opposite for the worse, else 0."""
    learner, experience = learner_of(tmp_path), rollout()
    batch = learner.collate(taught(learner, experience).episodes)
    said = torch.full(batch["mask"].shape, -1.5, requires_grad=True)
    learner.parts.engine.forward = lambda *_: Judged(said, torch.zeros_like(said), None)
    learner.loss(batch, 3, {}).backward()
    assert said.grad is not None
    for better, worse in zip(BETTER, WORSE, strict=True):
        ref = [float(experience.episodes[place].ref_logprobs.sum()) for place in (better, worse)]
        margin = BETA * ((-1.5 * len(IDS[better]) - ref[0]) - (-1.5 * len(IDS[worse]) - ref[1]))
        slope = BETA / (1 + math.exp(margin)) / 3
        for place, sign in ((better, -1), (worse, 1)):
            expected = [sign * slope] * len(IDS[place]) + [0.0] * (4 - len(IDS[place]))
            assert said.grad[place].tolist() == pytest.approx(expected, abs=1e-6)
    assert not said.grad[4:6].any()


def test_the_best_of_each_prompt_stands_against_its_worst(tmp_path: Path) -> None:
    """Of four completions those between teach nothing; of equal ones the first counts; of a tie the first two stand, unlearned."""
    scores_N = torch.tensor([2.0, 5.0, 1.0, 5.0, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    assert best_against_worst(scores_N, 4).tolist() == [0, 1, -1, 0, 0, 0, 0, 0]
    learner = learner_of(tmp_path, completions_per_prompt=4, global_batch_size=2)
    experience = rollout()
    _, _, logged = learner.algorithm.advantages(experience, scores_N, BETA)
    assert logged == {"pairs_left_out": 1, "groups_without_signal": 0.5, "score_margin": 4}
    chosen = taught(learner, experience, scores_N)
    assert [each.position for each in chosen.episodes] == [1, 2, 4, 5]
    assert learner.counted(chosen.episodes) == 1
    whole = chosen.minibatches(0, 0, 0, 2, completions_per_row=2)
    assert sorted(whole[0]) == [0, 1, 2, 3] and {tuple(whole[0][:2]), tuple(whole[0][2:])} == {(0, 1), (2, 3)}


def test_pairs_go_through_a_pass_together_in_an_order_of_their_own() -> None:
    """Every pair once; another order in another pass, the same for the same numbers."""
    experience = Experience([episode(place, [1], [2]) for place in range(16)])
    passes = [experience.minibatches(3, 1, epoch, 2, completions_per_row=2) for epoch in (0, 1, 0)]
    for minibatches in passes:
        assert [len(each) for each in minibatches] == [4] * 4
        flat = [index for each in minibatches for index in each]
        assert sorted(flat) == list(range(16))
        assert all(flat[place] + 1 == flat[place + 1] and flat[place] % 2 == 0 for place in range(0, 16, 2))
    assert passes[0] == passes[2] != passes[1]


def test_a_policy_that_is_its_reference_wins_one_half() -> None:
    """The first two pairs differ by 4e-6 of 160 nats, which is rounding; the others by 0.01, one way and the other."""
    zeros_N = torch.zeros(4)
    moved_N = torch.tensor([4e-6, -4e-6, 0.01, -0.01])
    assert wins_beyond_rounding([moved_N - 40, zeros_N - 40, zeros_N - 40, zeros_N - 40]).tolist() == [0.5, 0.5, 1, 0]
