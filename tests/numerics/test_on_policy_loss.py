"""The whole loss of on-policy training on a batch whose every number can be worked out by hand, and advantages of stages.

The policy and the critic look at one token only, the last: tables. All probabilities are powers of 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.settings.resources import Resources
from pipeline.stage import Context, World
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from stages.alignment.grpo import GRPO, GRPOParams
from stages.alignment.ppo import PPO, PPOParams
from stages.alignment.rloo import RLOO, RLOOParams
from stages.lib.on_policy.actor_critic import ActorCritic, Judged
from stages.lib.on_policy.experience import Episode, Experience, collate_episodes
from stages.lib.on_policy.learning import Learner
from stages.lib.on_policy.loop import Aligner
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Algorithm, Parts, Progress
from stages.lib.on_policy.scoring import Scorer
from stages.lib.text.prompts import PromptRow, Prompts
from stages.lib.training.engine import Engine
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import derive_batch

LN2 = math.log(2)
PADDING = 0
PROBABILITIES = [
    [0.97, 0.01, 0.01, 0.01],  # nothing may depend on what follows padding
    [1 / 8, 1 / 8, 1 / 2, 1 / 4],
    [1 / 8, 1 / 4, 1 / 8, 1 / 2],
    [1 / 4, 1 / 4, 1 / 4, 1 / 4],
]
VALUES = [1e3, 1.0, 2.0, -1.0]
REWARDS = [{"kind": "regular_expression", "pattern": "x"}]
COMMON: dict[str, Any] = {
    "rewards": REWARDS,
    "rollouts": 2,
    "rollout_batch_size": 2,
    "global_batch_size": 2,
    "max_prompt_tokens": 4,
    "max_new_tokens": 4,
    "learning_rate": 0.1,
}


class Table(nn.Module):
    """What follows a token, or what it is worth: a row for each token."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        rows_BTV = self.rows[input_ids]
        return SimpleNamespace(logits=rows_BTV, last_hidden_state=rows_BTV)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model = Table([[value] for value in VALUES])
        self.score = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.score.weight)


def actor_critic(*, critic: bool) -> ActorCritic:
    policy: Any = Table([[math.log(p) for p in row] for row in PROBABILITIES])
    return ActorCritic(policy, Critic() if critic else None)


def float32(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def episode(position: int, prompt: list[int], ids: list[int], **fields: Any) -> Episode:
    nothing = np.zeros(len(ids), dtype=np.float32)
    names = ("generator_logprobs", "logprobs", "ref_logprobs", "values")
    rest: dict[str, Any] = {"ended": True, "rewards": np.zeros(1), **dict.fromkeys(names, nothing), **fields}
    return Episode(position=position, row_index=0, prompt_ids=np.array(prompt), ids=np.array(ids), **rest)


def two_episodes() -> Experience:
    """A long completion of a short prompt, and a short one of a long prompt: padding on both sides.

    The tokens were drawn behind 1, 2, 3 and behind 1. In units of log 2 the policy says -1, -1, -2 and -2 now. It said
    -2, -1, -1 and -3 when it wrote them, so the ratios are 2, 1, 1/2 and 2; the generator said 0, 1, 3 and -1 units less
    than it; the reference says 0, 1, -1 and 2 more than the policy now. The critic says 1, 2, -1 and 1.
    """
    policy, old = np.array([-1, -1, -2, -2]), np.array([-2, -1, -1, -3])
    said = {
        "logprobs": old,
        "generator_logprobs": old - np.array([0, 1, 3, -1]),
        "ref_logprobs": policy + np.array([0, 1, -1, 2]),
    }
    first, second = (
        {name: float32(*(LN2 * row[part])) for name, row in said.items()} for part in (slice(3), slice(3, 4))
    )
    return Experience(
        [
            episode(
                0,
                [1],
                [2, 3, 1],
                values=float32(0.5, 2, 0),
                advantages=float32(1, 2, -1),
                returns=float32(2, 1, 1),
                **first,
            ),
            episode(1, [3, 2, 1], [3], values=float32(1), advantages=float32(-3), returns=float32(3), **second),
        ]
    )


NUM_TOKENS = 4


def make_context(folder: Path, world: World, micro_batch_size: int | None) -> Context:
    return Context(
        inputs={},
        out=folder,
        work=folder,
        resume=None,
        checkpoints=Checkpoints(folder),
        seed=0,
        resources=Resources(micro_batch_size=micro_batch_size),
        journal=Journal(folder / "journal.jsonl", writes=False),
        world=world,
        stop_requested=lambda: False,
    )


def make_learner(
    folder: Path,
    algorithm: Algorithm,
    params: OnPolicyParams,
    *,
    engine: Any = None,
    world: World = World(),  # noqa: B008 - frozen
    micro_batch_size: int | None = None,
) -> Learner:
    ctx = make_context(folder, world, micro_batch_size)
    module = actor_critic(critic=params.has_critic)
    trained = [(part, 1.0) for part in (module.policy, module.value) if part is not None]
    groups, rates = parameter_groups(trained, params.weight_decay)
    parts = Parts(
        tokenizer=SimpleNamespace(pad_token_id=PADDING),  # type: ignore[arg-type]
        stop_ids=[],
        train=Prompts([PromptRow(0, [1], "x", {})]),
        heldout=Prompts([]),
        engine=engine or Engine(ctx, module, groups, params, None, torch.device("cpu")),
        module=module,
        generator=None,  # type: ignore[arg-type]
        rates=rates,
        scorer=Scorer(params.rewards, None),
        reference=None,
        mixture=None,
        parameters=0,
        policy_parameters=0,
    )
    batch = derive_batch(params.global_batch_size, Resources(micro_batch_size=micro_batch_size))
    return Learner(ctx, params, algorithm, parts, batch)


def ppo(folder: Path, *, more: dict[str, Any] | None = None, **options: Any) -> Learner:
    fields = {
        "clip_ratio": 0.2,
        "value_clip": 0.2,
        "value_coefficient": 0.1,
        "entropy_coefficient": 0.01,
        **(more or {}),
    }
    params = PPOParams(**COMMON, **fields)
    return make_learner(folder, PPO(params), params, **options)


def grpo(folder: Path, *, more: dict[str, Any] | None = None, **options: Any) -> Learner:
    params = GRPOParams(
        **COMMON,
        completions_per_prompt=2,
        **{"clip_ratio": 0.2, "kl_coefficient": 0.5, "kl_estimator": "k3", **(more or {})},
    )
    return make_learner(folder, GRPO(params), params, **options)


def loss_of(learner: Learner) -> tuple[float, dict[str, float]]:
    """The loss of both sequences at once, and what is logged, each divided by the number of tokens."""
    batch = collate_episodes(two_episodes().episodes, PADDING)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    totals: dict[str, float] = {}
    loss = learner.loss(batch, NUM_TOKENS, totals)
    return float(loss.detach()), {name: value / NUM_TOKENS for name, value in totals.items()}


def test_the_loss_of_ppo(tmp_path: Path) -> None:
    """max(-A rho, -A clip(rho, 0.8, 1.2)) for A = 1, 2, -1, -3 and rho = 2, 1, 1/2, 2:

    max(-2, -1.2) = -1.2, clipped; -2; max(1/2, 0.8) = 0.8, clipped; max(6, 3.6) = 6, which is not clipped: 3.6 in all.

    The entropies behind 1, 2, 3 and 1: 1/2 log 2 + 1/4 log 4 + 2/8 log 8 = 7/4 log 2 where the row is a permutation of
    (1/8, 1/8, 1/4, 1/2), and log 4 behind 3, where it is even: 29/4 log 2 in all.

    The critic, kept within 0.2 of what it said: V = 1, 2, -1, 1, V_old = 1/2, 2, 0, 1, R = 2, 1, 1, 3.
    V = 1 counts as 0.7: max(1, 1.69), clipped; (2 - 1)^2 = 1; V = -1 counts as -0.2: max(4, 1.44) = 4, which is not
    clipped; (1 - 3)^2 = 4: half of 10.69 in all.

    L = (3.6 + 0.1 x 10.69 / 2 - 0.01 x 29/4 log 2) / 4 tokens. How far the policy is from the one that wrote them, by k3
    with pi / pi_old = 2, 1, 1/2, 2: rho - 1 - log rho = 1 - log 2, 0, log 2 - 1/2, 1 - log 2: 3/2 - log 2 in all.
    """
    loss, logged = loss_of(ppo(tmp_path))
    expected = {
        "policy_loss": 3.6 / 4,
        "entropy": 7.25 * LN2 / 4,
        "value_loss": 10.69 / 2 / 4,
        "value_clipped": 1 / 4,
        "clipped": 2 / 4,
        "ratio": (2 + 1 + 0.5 + 2) / 4,
        "ratio_squares": (4 + 1 + 0.25 + 4) / 4,
        "policy_kl": (1.5 - LN2) / 4,
        "loss": (3.6 + 0.1 * 10.69 / 2 - 0.01 * 7.25 * LN2) / 4,
    }
    assert logged == pytest.approx(expected, abs=1e-6)
    assert loss == pytest.approx(expected["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [("k3", (3.5 - 2 * LN2) / 4), ("k2", 6 / 2 * LN2**2 / 4)],
)
def test_the_loss_of_grpo(estimator: str, divergence: float, tmp_path: Path) -> None:
    """The policy's loss as with PPO, 3.6 / 4, and half of the divergence from the reference, with ref / pi = 1, 2, 1/2, 4.

    k3, ref / pi - 1 - log(ref / pi): 0, 1 - log 2, log 2 - 1/2, 3 - 2 log 2: 7/2 - 2 log 2 in all. k2, half the squares of
    0, 1, -1, 2 units: 3 (log 2)^2 in all.
    """
    loss, logged = loss_of(grpo(tmp_path, more={"kl_estimator": estimator}))
    assert logged["kl_loss"] == pytest.approx(divergence, abs=1e-6)
    assert [loss, logged["loss"]] == pytest.approx([0.9 + 0.5 * divergence] * 2, abs=1e-6)
    assert "value_loss" not in logged


def test_what_is_switched_off_is_not_in_the_loss(tmp_path: Path) -> None:
    """Without divergence and entropy the loss is the policy's alone, and RLOO and PPO never have the divergence in it."""
    loss, logged = loss_of(grpo(tmp_path, more={"kl_coefficient": 0.0}))
    assert loss == pytest.approx(0.9, abs=1e-6)
    assert "kl_loss" not in logged
    params = RLOOParams(**COMMON, completions_per_prompt=2, kl_coefficient=0.5)
    loss, logged = loss_of(make_learner(tmp_path, RLOO(params), params))
    assert loss == pytest.approx(0.9, abs=1e-6)
    assert set(logged) == {"policy_loss", "entropy", "clipped", "ratio", "ratio_squares", "policy_kl", "loss"}


def test_another_clip_above(tmp_path: Path) -> None:
    """At 0.2 below and 0.5 above the first token counts -1.5 instead of -1.2: 3.3 in all. The last is free as before."""
    loss, logged = loss_of(grpo(tmp_path, more={"kl_coefficient": 0.0, "clip_ratio_high": 0.5}))
    assert loss == pytest.approx(3.3 / 4, abs=1e-6)
    assert logged["clipped"] == pytest.approx(2 / 4)


def test_the_loss_against_a_mismatch(tmp_path: Path) -> None:
    """pi_old / pi_generator = 1, 2, 8, 1/2, at most 3, weighs the policy's loss: -1.2 - 4 + 3 x 0.8 + 3 = 0.2 in all.

    Divergence and entropy are not weighted.
    """
    loss, logged = loss_of(grpo(tmp_path, more={"mismatch_cap": 3.0, "entropy_coefficient": 0.01}))
    assert logged["policy_loss"] == pytest.approx(0.2 / 4, abs=1e-6)
    assert loss == pytest.approx((0.2 + 0.5 * (3.5 - 2 * LN2) - 0.01 * 7.25 * LN2) / 4, abs=1e-6)


class Saying:
    """An engine whose module says the same of every batch, so that gradients with regard to that can be looked at."""

    device = torch.device("cpu")

    def __init__(self, *, critic: bool) -> None:
        self.logprobs = (LN2 * torch.tensor([[-1.0, -1, -2], [-2, -7, -7]])).requires_grad_()
        self.entropy = torch.ones(2, 3, requires_grad=True)
        self.values = torch.tensor([[1.0, 2, -1], [1, 9, 9]], requires_grad=True) if critic else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_new_tokens: int) -> Judged:
        assert (input_ids.shape, num_new_tokens) == ((2, 6), 3)
        return Judged(self.logprobs, self.entropy, self.values)


def gradients(folder: Path, make: Any, *, critic: bool, **more: Any) -> list[list[list[float]]]:
    engine = Saying(critic=critic)
    loss = make(folder, engine=engine, more=more).loss(
        collate_episodes(two_episodes().episodes, PADDING), NUM_TOKENS, {}
    )
    tensors = [tensor for tensor in (engine.logprobs, engine.entropy, engine.values) if tensor is not None]
    return [
        gradient.tolist() for gradient in torch.autograd.grad(loss, tensors, allow_unused=True) if gradient is not None
    ]


def near(expected: list[list[float]]) -> list[Any]:
    return [pytest.approx(row, abs=1e-6) for row in expected]


def test_the_gradient_of_ppo(tmp_path: Path) -> None:
    """With regard to log pi: -A rho where nothing is clipped, else 0: 0, -2, 0 and 6, each divided by 4 tokens.

    To the entropy: -0.01 for each token. To the value, 0.1 (V - R): 0 where it is clipped, 0.1, -0.2 and -0.2. Padding: 0.
    """
    logprobs, entropy, values = gradients(tmp_path, ppo, critic=True)
    assert logprobs == near([[0, -2 / 4, 0], [6 / 4, 0, 0]])
    assert entropy == near([[-0.01 / 4] * 3, [-0.01 / 4, 0, 0]])
    assert values == near([[0, 0.1 / 4, -0.2 / 4], [-0.2 / 4, 0, 0]])


def test_the_gradient_of_grpo(tmp_path: Path) -> None:
    """As for PPO, and 1/2 (1 - ref / pi) with ref / pi = 1, 2, 1/2, 4: 0, -1/2, 1/4, -3/2. k2: -1/2 log(ref / pi)."""
    (logprobs,) = gradients(tmp_path, grpo, critic=False)
    assert logprobs == near([[0, -2.5 / 4, 0.25 / 4], [4.5 / 4, 0, 0]])
    (logprobs,) = gradients(tmp_path, grpo, critic=False, kl_estimator="k2")
    assert logprobs == near([[0, (-2 - LN2 / 2) / 4, LN2 / 2 / 4], [(6 - LN2) / 4, 0, 0]])


@pytest.mark.parametrize("make", [ppo, grpo])
def test_micro_batches_do_not_change_a_step(make: Any, tmp_path: Path) -> None:
    """One sequence at a time, or both at once: the same logged numbers, the same gradient, the same weights after it.

    The sequences have 3 tokens and 1, so that a mean over each micro batch would weigh the single token three times. Of
    the ratios 2, 1, 1/2, 2 the mean is 11/8 and the variance 37/16 - 121/64 = 27/64.
    """
    once, twice = make(tmp_path), make(tmp_path, micro_batch_size=1)
    assert (once.batch.accumulation, twice.batch.accumulation) == (1, 2)
    before = [parameter.detach().clone() for parameter in once.parts.module.parameters()]
    stats, again = once.optimize(two_episodes(), [0, 1], 0), twice.optimize(two_episodes(), [1, 0], 0)
    for each in (stats, again):
        assert each.pop("seconds") >= 0
    assert again == pytest.approx(stats, abs=1e-6)
    assert stats["loss"] == pytest.approx(loss_of(make(tmp_path))[0], abs=1e-6)
    assert stats["ratio_deviation"] == pytest.approx(math.sqrt(27 / 64), abs=1e-6)
    assert stats["gradient_norm"] > 0
    for start, one, two in zip(before, once.parts.module.parameters(), twice.parts.module.parameters(), strict=True):
        assert not torch.equal(one, start)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [ppo, grpo])
def test_processes_do_not_change_the_loss(make: Any, tmp_path: Path) -> None:
    """Gradients are averaged over two processes, so each gives twice its part of the sum: their mean is the whole loss."""
    whole, _ = loss_of(make(tmp_path))
    parts = []
    for rank, each in enumerate(two_episodes().episodes):
        part = make(tmp_path, engine=make(tmp_path).parts.engine, world=World(rank=rank, size=2))
        parts.append(float(part.loss(collate_episodes([each], PADDING), NUM_TOKENS, {}).detach()))
    assert sum(parts) / 2 == pytest.approx(whole, abs=1e-6)


def test_padding_has_no_part_in_a_step(tmp_path: Path) -> None:
    """Of the tables' rows that behind padding, and only that, has no gradient."""
    with_critic, with_divergence = ppo(tmp_path), grpo(tmp_path)
    for each in (with_critic, with_divergence):
        each.loss(collate_episodes(two_episodes().episodes, PADDING), NUM_TOKENS, {}).backward()
    for table in (with_critic.parts.module.value.base_model, with_divergence.parts.module.policy):  # type: ignore[union-attr]
        assert table.rows.grad.abs().sum(dim=1).bool().tolist() == [False, True, True, True]


@pytest.mark.parametrize("make", [ppo, grpo])
def test_a_policy_that_never_pads_has_a_finite_loss(make: Any, tmp_path: Path) -> None:
    """It says -200 of the padding id, and exp(200) is infinite in float32: 0 times that would be no number."""
    plain, sharp = make(tmp_path), make(tmp_path)
    with torch.no_grad():
        for each, logit in ((plain, -30.0), (sharp, -200.0)):
            each.parts.module.policy.rows[:, PADDING] = logit
    (expected, _), (loss, logged) = loss_of(plain), loss_of(sharp)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert all(map(math.isfinite, logged.values()))
    sharp.loss(collate_episodes(two_episodes().episodes, PADDING), NUM_TOKENS, {}).backward()
    assert all(parameter.grad.isfinite().all() for parameter in sharp.parts.module.parameters())


# Advantages of the algorithms.


def advantages(algorithm: Algorithm, experience: Experience, scores: Sequence[float], beta: float) -> Any:
    scores_N = torch.tensor(scores, dtype=torch.float64)
    advantages_NK, returns_NK, logged = algorithm.advantages(experience, scores_N, beta)
    return advantages_NK.tolist(), returns_NK.tolist(), logged


def of_two_tokens_and_one() -> Experience:
    """log pi - log ref is (1, -1) and (2); the critic says (1, 1/2) and (0)."""
    first = {"logprobs": float32(-1, -2), "ref_logprobs": float32(-2, -1), "values": float32(1, 0.5)}
    second = {"logprobs": float32(-1), "ref_logprobs": float32(-3), "values": float32(0)}
    return Experience([episode(0, [1], [2, 3], **first), episode(1, [1, 2], [3], **second)])


def test_the_advantages_of_ppo(tmp_path: Path) -> None:
    """Scores 2 and -1, beta 1/2, gamma = lambda = 1.

    Rewards (-1/2, 1/2 + 2) and (-1 - 1); returns are what follows: (2, 5/2), (-2); advantages (1, 2), (-2).
    The critic leaves the residuals 1, 2, -2 of variance 26/9, and the returns have the variance 73/18: it explains
    1 - 52/73 = 21/73. Whitened, with mean 1/3: (2/3, 5/3, -7/3) / sqrt(26/9) = (2, 5, -7) / sqrt 26.
    """
    common = {**COMMON, "gamma": 1.0, "gae_lambda": 1.0}
    found, returns, logged = advantages(
        PPO(PPOParams(**common, whiten_advantages=False)), of_two_tokens_and_one(), [2, -1], 0.5
    )
    assert found == near([[1, 2], [-2, 0]])
    assert returns == near([[2, 2.5], [-2, 0]])
    expected = {
        "explained_variance": 21 / 73,
        "value_mean": 0.5,
        "return_mean": 5 / 6,
        "return_deviation": math.sqrt(73 / 18),
    }
    assert logged == pytest.approx(expected, abs=1e-6)
    found, again, _ = advantages(PPO(PPOParams(**common)), of_two_tokens_and_one(), [2, -1], 0.5)
    root = math.sqrt(26)
    assert found == near([[2 / root, 5 / root], [-7 / root, 0]])
    assert again == returns, "the critic learns returns that are not whitened"


def test_the_advantages_of_ppo_with_whitened_rewards() -> None:
    """Scores 2 and 1: rewards (-1/2, 5/2) and 0, of mean 2/3 and variance (49 + 121 + 16) / 36 / 3 = 31/18.

    Their distances -7/6, 11/6 and -2/3 are multiplied by s := sqrt(18/31); with the mean again: (2/3 - 7s/6, 2/3 + 11s/6)
    and 2/3 - 2s/3. Returns (4/3 + 2s/3, 2/3 + 11s/6) and 2/3 - 2s/3, less the values (1, 1/2) and 0.
    """
    params = PPOParams(**COMMON, gamma=1.0, gae_lambda=1.0, whiten_rewards=True, whiten_advantages=False)
    found, returns, _ = advantages(PPO(params), of_two_tokens_and_one(), [2, 1], 0.5)
    s = math.sqrt(18 / 31)
    assert returns == near([[4 / 3 + 2 * s / 3, 2 / 3 + 11 * s / 6], [2 / 3 - 2 * s / 3, 0]])
    assert found == near([[1 / 3 + 2 * s / 3, 1 / 6 + 11 * s / 6], [2 / 3 - 2 * s / 3, 0]])


@pytest.mark.parametrize("whiten_advantages", [True, False])
def test_equal_scores_leave_ppo_the_penalty_alone(whiten_advantages: bool) -> None:
    """Scores 7 and 7, beta 1/2, gamma = lambda = 1: penalties (-1/2, 1/2) and -1, of which A is what follows: (0, 1/2), -1.

    Neither the scores nor the values (1, 1/2) and 0 have a part in it. The returns are (7, 15/2) and 6 as ever.
    """
    params = PPOParams(**COMMON, gamma=1.0, gae_lambda=1.0, whiten_advantages=whiten_advantages)
    found, returns, _ = advantages(PPO(params), of_two_tokens_and_one(), [7, 7], 0.5)
    assert found == near([[0, 0.5], [-1, 0]])
    assert returns == near([[7, 7.5], [6, 0]])
    nothing, _, _ = advantages(PPO(params), of_two_tokens_and_one(), [7, 7], 0.0)
    assert nothing == [[0, 0], [0, 0]]


def test_ppo_discounts_and_trusts_its_critic_as_it_is_told() -> None:
    """gamma = 1/2, lambda = 1/4: delta_1 = 5/2 - 1/2 = 2, delta_0 = -1/2 + 1/4 - 1 = -5/4, A_0 = -5/4 + 1/8 x 2 = -1."""
    params = PPOParams(**COMMON, gamma=0.5, gae_lambda=0.25, whiten_advantages=False)
    found, returns, _ = advantages(PPO(params), of_two_tokens_and_one(), [2, -1], 0.5)
    assert found == near([[-1, 2], [-2, 0]])
    assert returns == near([[0, 2.5], [-2, 0]])


def of_four() -> Experience:
    """Two prompts with two completions each, of 1, 3, 2 and 2 tokens. The divergences add up to 2, -2, 0 and 0."""
    said = [float32(-1), float32(-3, -4, -2), float32(-1, -1), float32(-2, -2)]
    ref = [float32(-3), float32(-2, -4, -1), float32(-2, 0), float32(-2, -2)]
    ids = [[1], [2, 3, 1], [1, 1], [2, 2]]
    return Experience(
        [episode(n, [1], ids[n], logprobs=said[n], ref_logprobs=ref[n]) for n in range(4)],
    )


@pytest.mark.parametrize(("scaled", "unit"), [(True, 1 / (math.sqrt(2) + 1e-4)), (False, 1.0)])
def test_the_advantages_of_grpo(scaled: bool, unit: float) -> None:
    """Scores (1, 3) and (5, 5): less the means -1, 1 and 0, 0, for every token; the deviation is sqrt((1 + 1) / 1).

    One group in two teaches nothing. The divergence has no part in it.
    """
    params = GRPOParams(**COMMON, completions_per_prompt=2, scale_by_deviation=scaled)
    found, returns, logged = advantages(GRPO(params), of_four(), [1, 3, 5, 5], 0.5)
    assert found == near([[-unit, 0, 0], [unit, unit, unit], [0, 0, 0], [0, 0, 0]])
    assert returns == [[0, 0, 0]] * 4
    assert logged == {"groups_without_signal": 0.5}


def test_the_advantages_of_rloo() -> None:
    """Scores (1, 3) and (5, 7), less 1/2 of the divergences 2, -2, 0, 0: (0, 4) and (5, 7).

    Less the other of the same prompt: -4, 4, -2, 2. Whitened over the 8 tokens: their mean is (-4 + 12 - 4 + 4) / 8 = 1,
    their variance (25 + 3 x 9 + 2 x 9 + 2 x 1) / 8 = 9: -5/3, 1, -1, 1/3.
    """
    params = RLOOParams(**COMMON, completions_per_prompt=2)
    found, returns, _ = advantages(RLOO(params), of_four(), [1, 3, 5, 7], 0.5)
    assert found == near([[-4, 0, 0], [4, 4, 4], [-2, -2, 0], [2, 2, 0]])
    assert returns == [[0, 0, 0]] * 4
    params = RLOOParams(**COMMON, completions_per_prompt=2, whiten_advantages=True)
    found, _, _ = advantages(RLOO(params), of_four(), [1, 3, 5, 7], 0.5)
    assert found == near([[-5 / 3, 0, 0], [1, 1, 1], [-1, -1, 0], [1 / 3, 1 / 3, 0]])


def test_rloo_with_another_estimator() -> None:
    """By k2 the divergences are 4/2, 1/2 + 0 + 1/2, 1/2 + 1/2 and 0: scores of 0 become -2, -1, -1, 0 at beta 1."""
    params = RLOOParams(**COMMON, completions_per_prompt=2, kl_estimator="k2")
    found, _, _ = advantages(RLOO(params), of_four(), [0, 0, 0, 0], 1.0)
    assert found == near([[-1, 0, 0], [1, 1, 1], [-1, -1, 0], [1, 1, 0]])


# From rewards to what is trained on.


def test_scores_on_their_way_to_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rewards, weighted 1 and -2, and 3 less without an end.

    First rollout: (1, 0), ended, is 1; (0, 1), cut off, is -2 - 3 = -5. Mean -2, deviation 3: 1 and -1, kept within 1/2.
    Their advantages are 1 and -1, each less the other. Logged are the scores as they were, of mean -2 and deviation 3, and
    what was trained on, of mean 0.

    Second rollout: 7 and 7. Of all four scores the mean is 5/2, the variance (9/4 + 225/4 + 81/4 + 81/4) / 4 = 99/4: both
    are 9/2 / sqrt(99/4) > 1/2, kept at 1/2, and teach nothing.
    """
    rewards = [
        {"kind": "regular_expression", "pattern": "x"},
        {"kind": "length_penalty", "target_tokens": 1, "per_token": 1.0},
    ]
    rewards[1]["weight"] = -2.0
    params = RLOOParams(
        **{**COMMON, "rewards": rewards},
        completions_per_prompt=2,
        kl_coefficient=0.0,
        missing_end_penalty=3.0,
        normalize_rewards=True,
        reward_clip=0.5,
        journal_samples=0,
    )
    rollouts = [
        [([1.0, 0.0], True), ([0.0, 1.0], False)],
        [([7.0, 0.0], True), ([7.0, 0.0], True)],
    ]
    made = make_learner(tmp_path, RLOO(params), params)
    aligner = Aligner(made.ctx, params, made.algorithm, made.parts, Progress(), made.batch)
    asked = []

    def complete(rows: Sequence[PromptRow], positions: Sequence[int], seed: int, before: None) -> Experience:
        asked.append((positions, seed))
        written = rollouts[positions[0] // 2]
        return Experience(
            [
                episode(position, rows[n].ids, [2, 1], rewards=np.array(reward), ended=ended)
                for n, (position, (reward, ended)) in enumerate(zip(positions, written, strict=True))
            ]
        )

    monkeypatch.setattr(aligner.rollouts, "complete", complete)
    aligner.collect(0)
    experience, collected = aligner.progress.experience, aligner.progress.collected
    assert experience is not None
    assert experience.padded("advantages").tolist() == near([[1, 1], [-1, -1]])
    expected = {"reward": -2, "reward_deviation": 3, "reward_trained_on": 0, "ended": 0.5, "advantage_deviation": 1}
    assert {name: collected[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert collected["reward_regular_expression"] == 0.5

    aligner.collect(1)
    experience, collected = aligner.progress.experience, aligner.progress.collected
    assert experience is not None
    assert not experience.padded("advantages").any()
    assert collected["reward"] == 7
    assert collected["reward_trained_on"] == pytest.approx(0.5, abs=1e-12)
    assert aligner.progress.moments.mean == pytest.approx(2.5, abs=1e-12)
    assert aligner.progress.moments.deviation == pytest.approx(math.sqrt(99 / 4), abs=1e-12)
    assert asked == [([0, 1], 0), ([2, 3], 0)]
