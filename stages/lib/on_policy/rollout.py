"""Rollouts: completions of prompts, what they are worth, and what policy, reference and critic say of every token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError, Problem, RewardError
from pipeline.stage import Context
from stages.lib.formulas import policy_gradient as pg
from stages.lib.generating.sampling import Sampled, uniforms_for
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.on_policy.experience import Episode, Experience, collate_episodes
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Parts
from stages.lib.on_policy.samples import Completion, Sample
from stages.lib.processes.collectives import any_process, from_all
from stages.lib.text.prompts import PromptRow
from stages.lib.text.tokenizers import decode_ids
from stages.lib.training.evaluating import Metrics, StopRequested


@dataclass
class Rollouts:
    """Writes completions and judges them."""

    ctx: Context
    params: OnPolicyParams
    parts: Parts

    def complete(self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int) -> Experience:
        """A completion of each prompt, judged and scored, each process its share; the same in all of them.

        Where the processes cannot share evenly, the first prompts are completed once more: under ZeRO-3 all must do the
        same number of forward passes. What counts is the first time, so that the number of processes changes nothing.
        """
        world = self.ctx.world
        share = math.ceil(len(rows) / world.size)
        mine = [index % len(rows) for index in range(world.rank * share, (world.rank + 1) * share)]
        my_rows, my_positions = [rows[index] for index in mine], [positions[index] for index in mine]
        sampled = self.write(my_rows, my_positions, seed)
        written = [
            unjudged(position, row, each) for position, row, each in zip(my_positions, my_rows, sampled, strict=True)
        ]
        episodes: list[Episode] = []
        size = self.ctx.resources.micro_batch_size or share
        for start in range(0, share, size):
            require_going_on(self.ctx)
            episodes += self.judge(written[start : start + size], my_rows[start : start + size])
        found = self.together(self.reward(episodes, my_rows))
        experience = Experience([found[position] for position in positions])
        self.say_troubles(experience)
        return experience

    def together(self, mine: list[Episode] | RewardError) -> dict[int, Episode]:
        """Position -> episode, of all processes. Raises in all of them what is wrong in any."""
        parts = from_all(mine)
        if wrong := [part for part in parts if isinstance(part, RewardError)]:
            raise RewardError(*dict.fromkeys(problem for error in wrong for problem in error.problems))
        return {each.position: each for part in reversed(parts) for each in reversed(part)}

    def write(self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int) -> list[Sampled]:
        """A completion of each prompt, in as many batches as the generator wants. All processes call it together."""
        generator = self.parts.generator
        starts = range(0, len(rows), generator.chunk_size)
        sampled: list[Sampled] = []
        with generator.ready() as sampler:
            for done, start in enumerate(starts):
                require_going_on(self.ctx)
                chunk = slice(start, start + generator.chunk_size)
                numbers = [uniforms_for(seed, place, self.params.max_new_tokens) for place in positions[chunk]]
                sampled += sampler.sample(
                    [row.ids for row in rows[chunk]],
                    np.stack(numbers),
                    stop_ids=self.parts.stop_ids,
                    temperature=self.params.temperature,
                )
                if len(starts) > 1:
                    self.ctx.journal.write("progress", what="chunks of completions", done=done + 1, total=len(starts))
        return sampled

    def judge(self, episodes: Sequence[Episode], rows: Sequence[PromptRow]) -> list[Episode]:
        """The episodes with what policy, critic and reference say of each token."""
        batch = self.parts.to_device(collate_episodes(episodes, self.parts.padding_id))
        width = batch["mask"].shape[1]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        judged: Judged = self.parts.engine.infer(**inputs, num_new_tokens=width)
        fields = {"logprobs": judged.logprobs}
        if judged.values is not None:
            fields["values"] = judged.values
        if self.parts.reference is not None:
            fields["ref_logprobs"] = self.parts.reference(**inputs, num_new_tokens=width).logprobs
        else:
            fields["ref_logprobs"] = judged.logprobs
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in fields.items()}
        return [
            replace(each, **{name: array[index, : len(each.ids)] for name, array in arrays.items()})
            for index, each in enumerate(episodes)
        ]

    def reward(self, episodes: Sequence[Episode], rows: Sequence[PromptRow]) -> list[Episode] | RewardError:
        """The episodes with what they are worth; or why one of them cannot be scored, which the others are to know too."""
        samples = [
            Sample(row.index, row.prompt, Completion(self.text_of(each), len(each.ids), each.ended), row.row)
            for each, row in zip(episodes, rows, strict=True)
        ]
        try:
            rewards, troubles = self.parts.scorer.score(samples, lambda: require_going_on(self.ctx))
        except RewardError as error:
            return error
        return [
            replace(each, rewards=worth, troubles=found)
            for each, worth, found in zip(episodes, rewards, troubles, strict=True)
        ]

    def say_troubles(self, experience: Experience) -> None:
        """Says how many completions rewards had trouble with, with the words for it and the first of them."""
        for name in self.parts.scorer.contained:
            found = [(each.row_index, each.troubles[name]) for each in experience.episodes if name in each.troubles]
            if found:
                row_index, first = found[0]
                words = ", ".join(f"{count} {word}" for word, count in Counter(each.word for _, each in found).items())
                self.ctx.journal.note(
                    f"rewards.{name}: trouble with {len(found)} of {len(experience)} completions ({words}), for example of"
                    f" row {row_index + 1}: {first.what}"
                )

    def text_of(self, episode: Episode) -> str:
        """What the policy wrote, without the token that ends it. Other special tokens stand in it as they are spelled."""
        ids = episode.ids[:-1] if episode.ended else episode.ids
        return decode_ids(self.parts.tokenizer, ids.tolist())

    def scores(self, experience: Experience) -> Tensor:
        """What each completion is worth: its weighted rewards, less the penalty for one that was cut off. N."""
        totals = self.parts.scorer.total(experience.rewards.numpy())
        return torch.tensor(totals, dtype=torch.float64) - self.params.missing_end_penalty * (1 - experience.ended)

    def describe(self, experience: Experience) -> Metrics:
        """Means over completions (rewards, lengths, ends) and over tokens (divergences)."""
        mask = experience.mask
        logp, ref, generator = (experience.padded(name) for name in ("logprobs", "ref_logprobs", "generator_logprobs"))
        scores_N = self.scores(experience)
        gap = ((logp - generator) * mask).abs()
        each_reward = dict(zip(self.parts.scorer.names, experience.rewards.mean(dim=0).tolist(), strict=True))
        return {
            "reward": float(scores_N.mean()),
            "reward_deviation": float(scores_N.std(correction=0)),
            **({f"reward_{name}": value for name, value in each_reward.items()} if len(each_reward) > 1 else {}),
            **{
                f"errors_{name}": float(sum(name in each.troubles for each in experience.episodes))
                for name in self.parts.scorer.contained
            },
            "kl": float((pg.k1(logp, ref) * mask).sum(dim=1).mean()),
            "kl_per_token": float(pg.masked_mean(pg.KL_ESTIMATORS[self.params.kl_estimator](logp, ref), mask)),
            "length_tokens": float(experience.lengths.mean()),
            "ended": float(experience.ended.mean()),
            "generator_logprob_gap": float(gap.sum() / mask.sum()),
            "generator_logprob_gap_max": float(gap.max()),
        }

    def samples(self, experience: Experience) -> list[dict[str, Any]]:
        """The first completions of the rollout, for reading."""
        shown = experience.episodes[: self.params.journal_samples]
        totals = self.parts.scorer.total(experience.rewards.numpy())
        return [
            {
                "prompt": self.parts.tokenizer.decode(each.prompt_ids.tolist()),
                "completion": self.text_of(each),
                "reward": round(total, 4),
                "ended": each.ended,
            }
            for each, total in zip(shown, totals, strict=False)
        ]


def unjudged(position: int, row: PromptRow, sampled: Sampled) -> Episode:
    """A completion of which nothing is known but what its generator says."""
    return Episode(
        position=position,
        row_index=row.index,
        prompt_ids=np.asarray(row.ids, dtype=np.int64),
        ids=sampled.ids,
        ended=sampled.ended,
        rewards=np.zeros(0),
        generator_logprobs=sampled.logprobs,
        logprobs=sampled.logprobs,
        ref_logprobs=sampled.logprobs,
        values=np.zeros_like(sampled.logprobs),
    )


def require_going_on(ctx: Context) -> None:
    """Raises `StopRequested`, in all processes at once, if one was asked to stop."""
    if any_process(ctx.stop_requested()):
        raise StopRequested


def require_like_generator(experience: Experience, limit: float | None) -> None:
    """Raises `DataError` if generation and training disagree about the completions by more than `limit` nats a token."""
    if limit is None:
        return
    mask = experience.mask
    gap = ((experience.padded("logprobs") - experience.padded("generator_logprobs")) * mask).abs().sum() / mask.sum()
    if float(gap) > limit:
        raise DataError(
            Problem(
                "params.max_logprob_mismatch",
                f"log-probabilities of generation and training differ by {float(gap):.3g} nats per token on average",
                "Generation runs with other weights or another arithmetic: look at precision and backend.",
            )
        )
