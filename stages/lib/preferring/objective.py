"""What is learned from pairs of answers: a loss of the table, or several by weight, and what is measured of it.

N: pairs of a micro batch, which is 2N sequences, the N chosen ones first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from pipeline.errors import RecipeError
from pipeline.stage import Context
from stages.lib.formulas.calibration import wins
from stages.lib.formulas.divergences import DIVERGENCES
from stages.lib.formulas.preference_losses import implicit_margin
from stages.lib.formulas.preference_table import PreferenceLoss
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.answers import (
    Answered,
    accuracy_by_category,
    accuracy_of_length,
    answer_tokens,
    ask_for_answers,
    wins_by_category,
)
from stages.lib.preferring.loss_params import PairLossParams, group_problem
from stages.lib.preferring.pairs import Pairs, num_pairs
from stages.lib.processes.collectives import all_reduce_sum
from stages.lib.text.batches import Collate
from stages.lib.training.evaluating import Evaluator, Metrics
from stages.lib.training.params import derive_batch

DEFAULT_ALPHA = 0.5
"""Of the alpha divergence, halfway between forward and reverse KL."""


class PreferenceObjective:
    """The losses that `params` name, summed over pairs.

    What it carries from step to step, where a loss asks for that, is the implicit rewards of all answers so far: their sum
    and their number. A step uses what stood before it, so that it is the same however its pairs are spread.
    """

    def __init__(self, params: PairLossParams) -> None:
        self.params = params
        self.losses = params.losses
        self.weights = params.loss_weights
        self.options = {name: params.options_of(name) for name in self.losses}
        self.carries = any(loss.takes_mean_reward for loss in self.losses.values())
        self.rewards: dict[str, float] = {"sum": 0.0, "answers": 0.0}
        self.seen: list[tuple[torch.Tensor, int]] = []
        """(sum, number) of the rewards in each micro batch since the step began."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return num_pairs(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        answered = self.ask(model, batch)
        if self.carries:
            ratio_2N = answered.counted.detach() - reference_logps(batch, answered.counted)
            self.seen.append((self.params.beta * ratio_2N.double().sum(), len(ratio_2N)))
        return self.losses_of(answered, batch).sum()

    def ask(self, model: torch.nn.Module, batch: Tensors) -> Answered:
        weighted = self.params.policy_weighting
        return ask_for_answers(model, batch, tail_weight=self.params.tail_weight, with_likelihood=weighted)

    # What it carries

    def begin_step(self) -> None:
        self.seen = []

    def end_step(self) -> None:
        """Adds up what the step's micro batches said, of all processes together."""
        if self.carries:
            mine = [float(sum(float(rewards) for rewards, _ in self.seen)), float(sum(count for _, count in self.seen))]
            rewards, answers = all_reduce_sum(mine)
            self.rewards = {"sum": self.rewards["sum"] + rewards, "answers": self.rewards["answers"] + answers}

    def carried(self) -> dict[str, float]:
        return dict(self.rewards) if self.carries else {}

    def carry_on(self, carried: Mapping[str, float]) -> None:
        self.rewards = dict(carried)

    @property
    def mean_reward(self) -> float:
        return self.rewards["sum"] / self.rewards["answers"] if self.rewards["answers"] else 0.0

    # The losses

    def losses_of(self, answered: Answered, batch: Tensors) -> torch.Tensor:
        """N losses, one a pair; of a loss that sorts pairs, one for each of the sorted places."""
        named = [(name, self.loss_of(name, answered, batch)) for name in self.losses]
        if isinstance(self.params.loss, str):
            return named[0][1]
        return torch.stack([self.weights[name] * loss_N for name, loss_N in named]).sum(dim=0)

    def loss_of(self, name: str, answered: Answered, batch: Tensors) -> torch.Tensor:
        """The N losses of one of the losses, not weighted."""
        loss, options = self.losses[name], dict(self.options[name])
        if loss.takes_mean_reward:
            options["mean_reward"] = self.mean_reward
        if loss.takes_nll:
            options["nll_N"] = -(answered.logp / answer_tokens(batch)).chunk(2)[0]
        vectors = self.vectors(loss, answered, batch)
        if self.params.sorted_pairs is not None and loss.sorts_pairs:
            groups = zip(*(vector.split(self.params.sorted_pairs) for vector in vectors), strict=True)
            return torch.cat([loss.function(*group, **options) for group in groups])
        loss_N: torch.Tensor = loss.function(*vectors, **options)
        if answered.likelihood is not None and loss.takes_policy_weight:
            loss_N = loss_N * answered.likelihood.chunk(2)[0] * answered.likelihood.chunk(2)[1]
        return loss_N

    def vectors(self, loss: PreferenceLoss, answered: Answered, batch: Tensors) -> list[torch.Tensor]:
        """What the loss's function takes: `chosen_N, rejected_N` and, if it needs them, `ref_chosen_N, ref_rejected_N`.

        Under another divergence than the reverse KL, and with a reward for length, the first two are what the implicit rewards
        then are in the place of log-ratios, and those of the reference are 0.
        """
        # Of losses that average none is given a weight of tails but sft, which does not compare answers at all.
        params, logp_2N = self.params, answered.logp if loss.averages_over_tokens else answered.counted
        ref_2N = reference_logps(batch, logp_2N) if loss.needs_reference else None
        if ref_2N is not None and params.f_divergence is not None:
            logp_2N, ref_2N = self.divergent(logp_2N - ref_2N), torch.zeros_like(ref_2N)
        if params.length_penalty and loss.takes_length_penalty:
            logp_2N = logp_2N + params.length_penalty / params.beta * answer_tokens(batch)
        return sides(loss, logp_2N, ref_2N, batch)

    def divergent(self, ratio_2N: torch.Tensor) -> torch.Tensor:
        """What the log-ratios are worth under the divergence that `params` name."""
        params = self.params
        assert params.f_divergence is not None
        divergence = DIVERGENCES[params.f_divergence]
        if not divergence.takes_alpha:
            return divergence.reward(ratio_2N)
        alpha = DEFAULT_ALPHA if params.f_divergence_alpha is None else params.f_divergence_alpha
        return divergence.reward(ratio_2N, alpha)

    # What is measured

    def margins(self, answered: Answered, batch: Tensors) -> torch.Tensor:
        """By how much the policy prefers the chosen answer of each pair: beta times a difference.

        With a reference, of the log-ratios to it; without one, of the log-probabilities. Averaged over tokens if the loss's
        are, of several losses the first of the table that compares. Neither divergence nor length penalty plays a part: the
        sign would be the same under any divergence, and what is asked is what the policy prefers.
        """
        comparing = [loss for loss in self.losses.values() if loss.compares] or list(self.losses.values())
        loss = next((loss for loss in comparing if loss.needs_reference), comparing[0])
        logp_2N = answered.counted
        ref_2N = reference_logps(batch, logp_2N) if loss.needs_reference else torch.zeros_like(logp_2N)
        return implicit_margin(*sides(loss, logp_2N, ref_2N, batch), beta=self.params.beta)

    def measure(self, model: torch.nn.Module, batch: Tensors, categories: Sequence[str]) -> Tensors:
        """Sums over pairs: who wins, by how much, and how far each answer moved away from the reference.

        Without a reference, the log-probabilities themselves stand in the place of what was moved.
        """
        answered = self.ask(model, batch)
        logp_2N = answered.counted
        margin_N = self.margins(answered, batch)
        wins_N = wins(margin_N, margin_N.new_zeros(()))
        moved_2N = logp_2N - reference_logps(batch, logp_2N) if self.params.needs_reference else logp_2N
        return {
            "pairs": margin_N.new_tensor(len(margin_N)),
            "wins": wins_N.sum(),
            "margin": margin_N.sum(),
            "loss": self.losses_of(answered, batch).sum(),
            "chosen": moved_2N.chunk(2)[0].sum(),
            "rejected": moved_2N.chunk(2)[1].sum(),
            "plain_wins": wins(*logp_2N.chunk(2)).sum(),
            "wins_per_token": wins(*(logp_2N / answer_tokens(batch)).chunk(2)).sum(),
            **wins_by_category(wins_N, batch, categories),
        }

    def heldout_metrics(self, evaluator: Evaluator, pairs: Pairs, collate: Collate) -> Metrics:
        """The means of what `measure` sums up, over all pairs."""
        sums = evaluator.sums(pairs, collate, partial(self.measure, categories=pairs.categories))
        means = {name: total / sums["pairs"] for name, total in sums.items()}
        metrics = {
            "heldout_accuracy": means["wins"],
            "heldout_margin": means["margin"],
            "heldout_loss": means["loss"],
            "heldout_accuracy_plain": means["plain_wins"],
            **accuracy_by_category(sums, pairs.categories),
        }
        if self.params.needs_reference:
            metrics["heldout_chosen_logprob_change"] = means["chosen"]
            metrics["heldout_rejected_logprob_change"] = means["rejected"]
        else:
            metrics["heldout_accuracy_per_token"] = means["wins_per_token"]
            metrics["heldout_chosen_logprob"] = means["chosen"]
            metrics["heldout_rejected_logprob"] = means["rejected"]
        return metrics


def sides(
    loss: PreferenceLoss, logp_2N: torch.Tensor, ref_2N: torch.Tensor | None, batch: Tensors
) -> list[torch.Tensor]:
    """`chosen_N, rejected_N` and, with a reference, `ref_chosen_N, ref_rejected_N`: sums over tokens, or means."""
    if loss.averages_over_tokens:
        tokens_2N = answer_tokens(batch)
        logp_2N = logp_2N / tokens_2N
        ref_2N = ref_2N / tokens_2N if ref_2N is not None else None
    return [*logp_2N.chunk(2), *(ref_2N.chunk(2) if ref_2N is not None else [])]


def reference_logps(batch: Tensors, like_2N: torch.Tensor) -> torch.Tensor:
    """The reference's log-probabilities of the 2N answers, in the format of `like_2N`."""
    return batch["reference_N2"].T.reshape(-1).to(like_2N.dtype)


def compared_with_the_start(before: Metrics, after: Metrics, pairs: Pairs) -> Metrics:
    """Of a training without a reference, what the model that it started from stands for: the same metrics as with one."""
    return {
        "heldout_chosen_logprob_change": after["heldout_chosen_logprob"] - before["heldout_chosen_logprob"],
        "heldout_rejected_logprob_change": after["heldout_rejected_logprob"] - before["heldout_rejected_logprob"],
        "heldout_accuracy_base": before["heldout_accuracy_plain"],
        "heldout_accuracy_base_per_token": before["heldout_accuracy_per_token"],
        "heldout_accuracy_longer": accuracy_of_length(pairs.answer_lengths()),
    }


def require_whole_groups(ctx: Context, params: PairLossParams) -> None:
    """Raises `RecipeError` if the processes that really run would split pairs that are sorted together."""
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    if problem := group_problem(params, batch.micro_batch_size):
        raise RecipeError(problem)
