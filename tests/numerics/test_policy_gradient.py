"""The mathematics of on-policy alignment against slow loops written from the formulas, and against numbers by hand."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.alignment.grpo import GRPOParams
from stages.alignment.ppo import PPOParams
from stages.lib.formulas import policy_gradient as pg

LN2 = math.log(2)
LENGTHS = [5, 1, 3, 8]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ragged(lengths: list[int], width: int, seed: int, num: int = 2) -> tuple[Tensor, list[Tensor]]:
    """A mask of these lengths, and `num` tensors of random numbers, which are not 0 behind the ends either."""
    generator = torch.Generator().manual_seed(seed)
    mask_NK = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).double()
    return mask_NK, [torch.randn(len(lengths), width, generator=generator, dtype=torch.float64) for _ in range(num)]


# Log-probabilities and entropy.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_and_entropy_are_those_of_torch(temperature: float) -> None:
    """A categorical distribution over logits / temperature."""
    logits_BKV = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    ids_BK = torch.tensor([[0, 6, 2], [3, 3, 1]])
    logp_BK, entropy_BK = pg.logprobs_and_entropy(logits_BKV, ids_BK, temperature=temperature)
    theirs = torch.distributions.Categorical(logits=logits_BKV.double() / temperature)
    torch.testing.assert_close(logp_BK.double(), theirs.log_prob(ids_BK), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_BK.double(), theirs.entropy(), rtol=1e-6, atol=1e-6)


def test_log_probabilities_and_entropy_by_hand() -> None:
    """Logits log(1, 1, 2) are softmax (1/4, 1/4, 1/2): entropy 2/4 log 4 + 1/2 log 2 = 3/2 log 2, and log(1/2) of token 2.

    At temperature 1/2 the weights are squared, (1, 1, 4) / 6: log(4/6), and an entropy of log 6 - 4/6 log 4. They come in
    float32, whatever the logits are.
    """
    logits_BKV, ids_BK = torch.tensor([[[1.0, 1.0, 2.0]]]).log(), torch.tensor([[2]])
    logp_BK, entropy_BK = pg.logprobs_and_entropy(logits_BKV, ids_BK)
    assert [logp_BK.item(), entropy_BK.item()] == pytest.approx([-LN2, 1.5 * LN2], abs=1e-6)
    logp_BK, entropy_BK = pg.logprobs_and_entropy(logits_BKV, ids_BK, temperature=0.5)
    assert [logp_BK.item(), entropy_BK.item()] == pytest.approx(
        [math.log(4 / 6), math.log(6) - 4 / 6 * 2 * LN2], abs=1e-6
    )
    assert all(each.dtype == torch.float32 for each in pg.logprobs_and_entropy(logits_BKV.bfloat16(), ids_BK))


def test_entropy_without_gradients() -> None:
    """Is the same number, and log-probabilities have the same gradients as with it: [i = id] - p_i, at temperature 1."""
    logits_BKV = torch.tensor([[[1.0, 1.0, 2.0]]]).log().requires_grad_()
    _, with_BK = pg.logprobs_and_entropy(logits_BKV, torch.tensor([[2]]))
    logp_BK, without_BK = pg.logprobs_and_entropy(logits_BKV, torch.tensor([[2]]), entropy_has_gradients=False)
    assert with_BK.requires_grad and not without_BK.requires_grad
    assert torch.equal(with_BK, without_BK)
    logp_BK.sum().backward()
    assert logits_BKV.grad is not None
    assert logits_BKV.grad.flatten().tolist() == pytest.approx([-0.25, -0.25, 0.5], abs=1e-6)


# Divergence.


def test_divergence_estimators_by_hand() -> None:
    """ref / pi = 1, 2, 1/2 is log pi - log ref = 0, -log 2, log 2.

    k1: that. k2: half its square. k3: ref / pi - 1 + k1: 0, 2 - 1 - log 2, 1/2 - 1 + log 2.
    """
    logp, ref_logp = tensor(-1.0, -2.0, -3.0), tensor(-1.0, -2.0 + LN2, -3.0 - LN2)
    expected = {
        "k1": [0.0, -LN2, LN2],
        "k2": [0.0, LN2**2 / 2, LN2**2 / 2],
        "k3": [0.0, 1 - LN2, LN2 - 0.5],
    }
    for name, values in expected.items():
        assert pg.KL_ESTIMATORS[name](logp, ref_logp).tolist() == pytest.approx(values, abs=1e-12), name


PI, REF = tensor(0.5, 0.25, 0.25), tensor(0.25, 0.25, 0.5)


def test_what_the_estimators_are_on_average() -> None:
    """Over all tokens, weighted by pi, and not by drawing.

    KL(pi || ref) = 1/2 log 2 + 0 - 1/4 log 2 = log(2) / 4, and that is the mean of k1. k3 is (log 2 - 1/2, 0, 1 - log 2):
    1/2 log 2 - 1/4 + 1/4 - 1/4 log 2 = log(2) / 4 as well. k2 is (log 2)^2 / 2 for two tokens of weight 3/4 in all:
    3/8 (log 2)^2, which is another number.
    """
    mean = {name: float((PI * estimate(PI.log(), REF.log())).sum()) for name, estimate in pg.KL_ESTIMATORS.items()}
    assert mean == pytest.approx({"k1": LN2 / 4, "k2": 3 / 8 * LN2**2, "k3": LN2 / 4}, abs=1e-12)


@pytest.mark.parametrize("name", sorted(pg.KL_ESTIMATORS))
def test_what_the_gradients_of_the_estimators_are_on_average(name: str) -> None:
    """As a term of the loss the estimate of a drawn token is differentiated, and not the chance to draw it.

    With d log pi_i / d z_j = [i = j] - pi_j the mean gradient with regard to the logits z is:
    k1, sum_i pi_i ([i = j] - pi_j) = 0, which is why GRPO does not offer it; k2, sum_i pi_i log(pi_i / ref_i) ([i = j] - pi_j)
    = pi_j (log(pi_j / ref_j) - KL), the gradient of KL(pi || ref); k3, sum_i (pi_i - ref_i) ([i = j] - pi_j) = pi_j - ref_j,
    that of KL(ref || pi).
    """
    logits = PI.log().requires_grad_()
    (PI * pg.KL_ESTIMATORS[name](logits.log_softmax(-1), REF.log())).sum().backward()
    log_ratio = (PI / REF).log()
    expected = {"k1": PI * 0, "k2": PI * (log_ratio - (PI * log_ratio).sum()), "k3": PI - REF}[name]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_the_recipes_offer_the_table() -> None:
    """PPO and RLOO all of it, GRPO what has a gradient as a term of the loss."""
    assert set(get_args(PPOParams.model_fields["kl_estimator"].annotation)) == set(pg.KL_ESTIMATORS)
    assert set(get_args(GRPOParams.model_fields["kl_estimator"].annotation)) == set(pg.KL_ESTIMATORS) - {"k1"}


# Masked statistics.


def test_masked_statistics_by_hand() -> None:
    """1, 2 and 6 are looked at: mean 3, variance (4 + 1 + 9) / 3 = 14/3."""
    values, mask = torch.stack([tensor(1, 2, 100), tensor(6, -50, 7)]), torch.stack([tensor(1, 1, 0), tensor(1, 0, 0)])
    assert float(pg.masked_mean(values, mask)) == pytest.approx(3, abs=1e-12)
    assert float(pg.masked_variance(values, mask)) == pytest.approx(14 / 3, abs=1e-12)


def test_masked_statistics_are_those_of_numpy() -> None:
    mask_NK, (values_NK, _) = ragged(LENGTHS, 8, seed=1)
    looked_at = values_NK[mask_NK.bool()].numpy()
    assert float(pg.masked_mean(values_NK, mask_NK)) == pytest.approx(looked_at.mean(), abs=1e-12)
    assert float(pg.masked_variance(values_NK, mask_NK)) == pytest.approx(looked_at.var(), abs=1e-12)


def test_whitening_by_hand() -> None:
    """2, 4 and 6: mean 4, variance 8/3, so (-2, 0, 2) / sqrt(8/3) = (-1, 0, 1) sqrt(3/2); with the mean again, 4 more.

    What the mask does not cover is 0, in either case.
    """
    values, mask = tensor(2, 99, 4, 6), tensor(1, 0, 1, 1)
    step = math.sqrt(1.5)
    assert pg.whiten(values, mask).tolist() == pytest.approx([-step, 0, 0, step], abs=1e-6)
    assert pg.whiten(values, mask, shift_mean=False).tolist() == pytest.approx([4 - step, 0, 4, 4 + step], abs=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_against_a_slow_loop(shift_mean: bool) -> None:
    mask_NK, (values_NK, _) = ragged(LENGTHS, 9, seed=2)
    kept = [float(values_NK[n, k]) for n, length in enumerate(LENGTHS) for k in range(length)]
    mean = sum(kept) / len(kept)
    variance = sum((value - mean) ** 2 for value in kept) / len(kept)
    whitened_NK = pg.whiten(values_NK, mask_NK, shift_mean=shift_mean)
    for n, length in enumerate(LENGTHS):
        for k in range(9):
            expected = (float(values_NK[n, k]) - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
            assert float(whitened_NK[n, k]) == pytest.approx(expected if k < length else 0, abs=1e-6)


def test_whitening_of_equal_numbers_is_finite() -> None:
    """(7 - 7) / sqrt(0 + 1e-8) = 0: nothing to learn from, and no division by 0."""
    assert pg.whiten(tensor(7, 7, 7), tensor(1, 1, 0)).tolist() == [0, 0, 0]


def test_explained_variance_by_hand() -> None:
    """Returns 1, 2, 3 of variance 2/3. A critic that says them: 1. One that says 2, or any other number: 0.

    One that says 3, 2, 1 leaves -2, 0, 2, of variance 8/3: 1 - 4 = -3. One that is wrong by the same 5 everywhere: 1.
    """
    returns, mask = tensor(1, 2, 3, -9), tensor(1, 1, 1, 0)
    said = {1: tensor(1, 2, 3, 4), 0: tensor(2, 2, 2, 8), -3: tensor(3, 2, 1, 0)}
    for expected, values in said.items():
        assert float(pg.explained_variance(values, returns, mask)) == pytest.approx(expected, abs=1e-6)
    assert float(pg.explained_variance(returns + 5, returns, mask)) == pytest.approx(1, abs=1e-6)


# Rewards and advantages.


def test_rewards_of_tokens_by_hand() -> None:
    """-1/2 kl for every token, and the score on top of the last: (-1, -2 + 10), (-3 - 20). Nothing behind the end."""
    kl_NK = torch.stack([tensor(2, 4, 88), tensor(6, 77, 66)])
    mask_NK = torch.stack([tensor(1, 1, 0), tensor(1, 0, 0)])
    rewards_NK = pg.token_rewards(tensor(10, -20), kl_NK, mask_NK, kl_coefficient=0.5)
    assert rewards_NK.tolist() == [[-1, 8, 0], [-23, 0, 0]]


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t and V = 0 behind the end."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * later - now for r, now, later in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** (later - place) * deltas[later] for later in range(place, len(deltas)))
        for place in range(len(deltas))
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("seed", [3, 4])
def test_advantages_against_a_slow_loop(gamma: float, lam: float, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 13, 6).tolist()
    mask_NK, (rewards_NK, values_NK) = ragged(lengths, 12, seed)
    advantages_NK, returns_NK = pg.generalized_advantages(rewards_NK, values_NK, mask_NK, gamma=gamma, lam=lam)
    for n, length in enumerate(lengths):
        values = values_NK[n, :length].tolist()
        expected = slow_advantages(rewards_NK[n, :length].tolist(), values, gamma, lam)
        padding = [0.0] * (12 - length)
        assert advantages_NK[n].tolist() == pytest.approx([*expected, *padding], abs=1e-6)
        returns = [advantage + value for advantage, value in zip(expected, values, strict=True)]
        assert returns_NK[n].tolist() == pytest.approx([*returns, *padding], abs=1e-6)


def test_advantages_by_hand() -> None:
    """Rewards (1, 2), values (3, 5), gamma 1/2, lambda 1/2.

    delta_1 = 2 - 5 = -3 = A_1; delta_0 = 1 + 5/2 - 3 = 1/2, A_0 = 1/2 + 1/4 (-3) = -1/4. Returns: -1/4 + 3 and -3 + 5.
    """
    advantages_NK, returns_NK = pg.generalized_advantages(
        tensor(1, 2).unsqueeze(0), tensor(3, 5).unsqueeze(0), torch.ones(1, 2), gamma=0.5, lam=0.5
    )
    assert advantages_NK.tolist() == [[-0.25, -3]]
    assert returns_NK.tolist() == [[2.75, 2]]


def test_returns_without_the_critics_help_are_the_rewards_that_follow() -> None:
    """At lambda 1 the values telescope away: return_t = sum_l gamma^l r_{t+l}. At gamma 1 that is a plain sum."""
    mask_NK, (rewards_NK, values_NK) = ragged(LENGTHS, 8, seed=5)
    for gamma in (1.0, 0.7):
        _, returns_NK = pg.generalized_advantages(rewards_NK, values_NK, mask_NK, gamma=gamma, lam=1.0)
        for n, length in enumerate(LENGTHS):
            rewards = rewards_NK[n, :length].tolist()
            expected = [sum(gamma**later * r for later, r in enumerate(rewards[place:])) for place in range(length)]
            assert returns_NK[n, :length].tolist() == pytest.approx(expected, abs=1e-6)


def test_advantages_that_trust_the_critic_look_one_token_ahead() -> None:
    """At lambda 0 the return is r_t + gamma V_{t+1}."""
    mask_NK, (rewards_NK, values_NK) = ragged([4], 4, seed=6)
    _, returns_NK = pg.generalized_advantages(rewards_NK, values_NK, mask_NK, gamma=0.8, lam=0.0)
    after_NK = torch.cat([values_NK[:, 1:], torch.zeros(1, 1)], dim=1)
    torch.testing.assert_close(returns_NK, rewards_NK + 0.8 * after_NK, rtol=0, atol=1e-12)


def test_advantages_do_not_see_padding() -> None:
    """Wider padding, and other numbers in it, change not a bit."""
    mask_NK, (rewards_NK, values_NK) = ragged(LENGTHS, 8, seed=7)
    plain = pg.generalized_advantages(rewards_NK, values_NK, mask_NK, gamma=0.9, lam=0.8)

    def widened(tensor_NK: Tensor, fill: float) -> Tensor:
        wide_NK = torch.full((len(LENGTHS), 11), fill, dtype=torch.float64)
        wide_NK[:, :8] = torch.where(mask_NK.bool(), tensor_NK, fill)
        return wide_NK

    wide = pg.generalized_advantages(
        widened(rewards_NK, 1e6), widened(values_NK, -1e6), widened(mask_NK, 0.0), gamma=0.9, lam=0.8
    )
    for narrow_NK, wide_NK in zip(plain, wide, strict=True):
        assert torch.equal(wide_NK[:, :8], narrow_NK)
        assert not wide_NK[:, 8:].any()


def test_advantages_within_groups_by_hand() -> None:
    """Scores (1, 2, 6) and (4, 4, 4): less the means 3 and 4, (-2, -1, 3) and zeros.

    The deviation divides by the number less one: sqrt((4 + 1 + 9) / 2) = sqrt 7, and 1e-4 is added to it.
    """
    scores_N = tensor(1, 2, 6, 4, 4, 4)
    assert pg.group_advantages(scores_N, 3, scale=False).tolist() == [-2, -1, 3, 0, 0, 0]
    divisor = math.sqrt(7) + 1e-4
    expected = [-2 / divisor, -1 / divisor, 3 / divisor, 0, 0, 0]
    assert pg.group_advantages(scores_N, 3, scale=True).tolist() == pytest.approx(expected, abs=1e-12)


def test_leave_one_out_by_hand() -> None:
    """Scores (1, 2, 6): less the means of the others, 4, 7/2 and 3/2: (-3, -3/2, 9/2)."""
    advantages_N = pg.leave_one_out_advantages(tensor(1, 2, 6, 5, 5, 5), 3)
    assert advantages_N.tolist() == pytest.approx([-3, -1.5, 4.5, 0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_leave_one_out_is_a_multiple_of_the_centered_score(group_size: int) -> None:
    """s - (n m - s) / (n - 1) = n / (n - 1) (s - m), with m the mean of the group of n."""
    scores_N = torch.randn(12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    centered_N = pg.group_advantages(scores_N, group_size, scale=False)
    expected_N = centered_N * group_size / (group_size - 1)
    torch.testing.assert_close(pg.leave_one_out_advantages(scores_N, group_size), expected_N, rtol=0, atol=1e-12)


# Losses.


def test_clipped_value_loss_by_hand() -> None:
    """V_old = 0 and c = 1, so that V counts as kept within -1 and 1.

    V = 3, R = 4: free (3 - 4)^2 = 1, kept (1 - 4)^2 = 9, the larger decides: 9/2, clipped, without a gradient.
    V = 3, R = 0: free 9, kept 1: 9/2, free, gradient V - R = 3.
    V = -3, R = -2: free 1, kept (-1 + 2)^2 = 1: equal, which is not clipped: 1/2.
    V = -3, R = -4: free 1, kept 9: 9/2, clipped.
    V = 1/2, R = 2: both (3/2)^2: 9/8, free, gradient -3/2.
    """
    values, returns = tensor(3, 3, -3, -3, 0.5).requires_grad_(), tensor(4, 0, -2, -4, 2)
    loss, clipped = pg.clipped_value_loss(values, torch.zeros(5), returns, clip=1.0)
    assert loss.tolist() == [4.5, 4.5, 0.5, 4.5, 1.125]
    assert clipped.tolist() == [1, 0, 0, 1, 0]
    gradient = torch.autograd.grad(loss.sum(), values)[0]
    assert gradient[[0, 1, 3, 4]].tolist() == [0, 3, 0, -1.5]


def test_value_loss_without_a_clip() -> None:
    """(V - R)^2 / 2, wherever V was."""
    loss, clipped = pg.clipped_value_loss(tensor(3, -3), tensor(0, 100), tensor(4, 0), clip=None)
    assert loss.tolist() == [0.5, 4.5]
    assert clipped.tolist() == [0, 0]


def test_clipped_value_loss_against_a_slow_loop() -> None:
    _, (values, old_values, returns) = ragged([50] * 4, 50, seed=10, num=3)
    losses, _ = pg.clipped_value_loss(values, old_values, returns, clip=0.4)
    for value, old, target, loss in zip(
        *(x.flatten().tolist() for x in (values, old_values, returns, losses)), strict=True
    ):
        near = min(max(value, old - 0.4), old + 0.4)
        assert loss == pytest.approx(max((value - target) ** 2, (near - target) ** 2) / 2, abs=1e-6)


def test_weights_against_a_mismatch_by_hand() -> None:
    """pi_old / pi_generator = 1, 2, 1/2 and 8, at most 3; without a cap nothing is weighted."""
    old_logp, generator_logp = tensor(-1, -1, -1, -1), tensor(-1, -1 - LN2, -1 + LN2, -1 - 3 * LN2)
    assert pg.mismatch_weights(old_logp, generator_logp, cap=3.0).tolist() == pytest.approx([1, 2, 0.5, 3], abs=1e-12)
    assert pg.mismatch_weights(old_logp, generator_logp, cap=None).tolist() == [1, 1, 1, 1]


# What changes from rollout to rollout.


def test_the_adaptive_controller_by_hand() -> None:
    """Target 10, horizon 1000, 500 completions: beta is multiplied by 1 + e / 2, with e = KL / 10 - 1 within +- 0.2.

    KL 11: e = 0.1, from 2 to 2.1. KL 9.5: e = -0.05, times 0.975. KL 100: e would be 9, and is 0.2, times 1.1. KL 0 and
    below, which k1 can give: -0.2, times 0.9. KL 10: as it is.
    """
    controller = pg.KLController(2.0, target=10.0, horizon=1000.0)
    for kl, expected in [
        (11.0, 2.1),
        (9.5, 2.1 * 0.975),
        (100.0, 2.1 * 0.975 * 1.1),
        (0.0, 2.1 * 0.975 * 1.1 * 0.9),
        (-5.0, 2.1 * 0.975 * 1.1 * 0.81),
        (10.0, 2.1 * 0.975 * 1.1 * 0.81),
    ]:
        controller.update(kl, 500)
        assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_the_adaptive_controller_against_a_slow_loop() -> None:
    controller, beta = pg.KLController(0.1, target=6.0, horizon=10_000.0), 0.1
    for kl in np.random.default_rng(11).uniform(0, 15, 50):
        controller.update(float(kl), 64)
        beta = beta * (1 + float(np.clip((kl - 6) / 6, -0.2, 0.2)) * 64 / 10_000)
        assert controller.coefficient == pytest.approx(beta, abs=1e-6)


@pytest.mark.parametrize("horizon", [1.0, 1.7, 8.0, 1e-3, 1e-300])
@pytest.mark.parametrize("kl", [0.0, -1e9, 1e9, math.nan, math.inf, -math.inf])
def test_the_coefficient_never_changes_its_sign(kl: float, horizon: float) -> None:
    """Of 1 - 8/5 / horizon, which is below 0 for horizons below 8/5, nothing is left; nor does it run to 0 or infinity."""
    controller = pg.KLController(0.05, target=6.0, horizon=horizon)
    for _ in range(5000):
        controller.update(kl, 8)
        assert 0 < controller.coefficient < 1e13


def test_the_floor_of_the_controller_by_hand() -> None:
    """16 completions in a horizon of 8 with the KL at 0: twice a fifth less, 0.64, and not 1 - 0.4 = 0.6."""
    controller = pg.KLController(1.0, target=6.0, horizon=8)
    controller.update(0.0, 16)
    assert controller.coefficient == pytest.approx(0.64, rel=1e-12)


@pytest.mark.parametrize("completions", [1, 7, 64, 512, 9999, 10_000])
def test_within_a_horizon_the_floor_changes_no_bit(completions: int) -> None:
    for kl in np.random.default_rng(5).uniform(-5, 20, 200):
        controller = pg.KLController(0.05, target=6.0, horizon=10_000.0)
        controller.update(float(kl), completions)
        error = min(max(float(kl) / 6.0 - 1, -0.2), 0.2)
        assert controller.coefficient == 0.05 * (1 + error * completions / 10_000.0)


# Equal numbers: what is left of them is how they were added up.

ALIKE = [0.1, 0.7, -1 / 3, 1e6 + 0.1, 1e-9, 0.0]


@pytest.mark.parametrize("value", ALIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_a_group_of_equal_scores_has_no_advantage(value: float, dtype: torch.dtype, size: int) -> None:
    """The mean of ten times 0.1 is not 0.1: neither that nor its division by a deviation of 1e-17 is left."""
    scores_N = torch.full((3 * size,), value, dtype=dtype)
    for scale in (True, False):
        assert not pg.group_advantages(scores_N, size, scale=scale).any()
    assert not pg.leave_one_out_advantages(scores_N, size).any()
    mask = torch.ones(3 * size, dtype=dtype)
    assert not pg.whiten(scores_N, mask).any()
    assert pg.whiten(scores_N, mask, shift_mean=False).tolist() == pytest.approx(scores_N.tolist(), rel=1e-6)
    moments = pg.RunningMoments()
    for _ in range(3):
        moments.update(scores_N)
    assert moments.deviation == 1
    assert pg.all_equal(moments.normalize(scores_N).view(1, -1)).all()


def test_scores_that_are_equal_but_for_rounding_have_none() -> None:
    """0.1 + 0.2 is 0.30000000000000004, another reward of 0.3 is not."""
    scores_N = tensor(0.1 + 0.2, 0.3, 0.3)
    assert scores_N[0] != scores_N[1]
    assert not pg.group_advantages(scores_N, 3, scale=True).any()
    assert not pg.leave_one_out_advantages(scores_N, 3).any()
    assert not pg.whiten(scores_N, torch.ones(3)).any()


def test_a_small_difference_is_one() -> None:
    """A thousandth of the scores, or one in a hundred thousand, is seen; and groups are judged one by one."""
    found = pg.group_advantages(tensor(1, 1.001, 5, 5, 1e5, 1e5 + 1), 2, scale=False)
    assert found.tolist() == pytest.approx([-0.0005, 0.0005, 0, 0, -0.5, 0.5], abs=1e-9)


def test_the_fixed_controller() -> None:
    controller = pg.KLController(0.05)
    for kl in (0.0, 1e6):
        controller.update(kl, 512)
    assert controller.coefficient == 0.05


def test_running_moments_by_hand() -> None:
    """(1, 3), then (8): mean 4, squares 9 + 1 + 16 = 26, deviation sqrt(26 / 3). Before: no number is changed."""
    moments = pg.RunningMoments()
    assert moments.normalize(tensor(5, 7)).tolist() == [5, 7]
    moments.update(tensor(1, 3))
    assert (moments.mean, moments.deviation) == (2, 1)
    moments.update(tensor(8))
    assert (moments.count, moments.mean) == (3, 4)
    assert moments.deviation == pytest.approx(math.sqrt(26 / 3), rel=1e-12)
    assert moments.normalize(tensor(4, 10)).tolist() == pytest.approx([0, 6 / math.sqrt(26 / 3)], rel=1e-12)
    assert pg.RunningMoments(**asdict(moments)) == moments


def test_running_moments_of_batches_are_those_of_all_at_once() -> None:
    """Far from 0, where a sum of squares would lose digits."""
    scores = torch.from_numpy(np.random.default_rng(12).normal(1e6, 3, 60))
    moments = pg.RunningMoments()
    for batch in scores.split([1, 7, 20, 32]):
        moments.update(batch)
    assert moments.count == 60
    assert moments.mean == pytest.approx(float(np.mean(scores.numpy())), rel=1e-12)
    assert moments.deviation == pytest.approx(float(np.std(scores.numpy())), rel=1e-6)


def test_running_moments_without_a_deviation() -> None:
    """Of one score, or of equal ones, no deviation is known: scores are shifted, and not divided by 0."""
    for seen in (tensor(4), tensor(4, 4, 4)):
        moments = pg.RunningMoments()
        moments.update(seen)
        assert moments.normalize(tensor(4, 6)).tolist() == [0, 2]
