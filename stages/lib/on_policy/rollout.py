"""Rollouts: completions of prompts, what they are worth, and what policy, reference and critic say of every token."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError, Problem, RewardError
from pipeline.stage import Context
from stages.lib.formulas import policy_gradient as pg
from stages.lib.generating.generator import Sampler
from stages.lib.generating.sampling import Sampled, uniforms_for
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.on_policy.contained_calls import require_all_scored
from stages.lib.on_policy.episode_params import EpisodeParams
from stages.lib.on_policy.experience import Episode, Experience, collate_episodes
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Parts
from stages.lib.on_policy.samples import Completion, Sample
from stages.lib.on_policy.turns import OpenEpisode
from stages.lib.processes.collectives import any_process, from_all
from stages.lib.processes.contained import Abandoned
from stages.lib.text.prompts import PromptRow
from stages.lib.text.tokenizers import decode_ids
from stages.lib.training.evaluating import Metrics, StopRequested


@dataclass
class Rollouts:
    """Writes completions and judges them."""

    ctx: Context
    params: OnPolicyParams
    parts: Parts

    def complete(
        self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int, before: Experience | None = None
    ) -> Experience:
        """A completion of each prompt, judged and scored, each process its share; the same in all of them.

        `before`: the completions, where they were written before. What counts of a share is the first time that a prompt is
        completed, so that the number of processes changes nothing.
        """
        mine = self.share_of(len(rows))
        my_rows, my_positions = [rows[index] for index in mine], [positions[index] for index in mine]
        if before is None:
            written = self.write(my_rows, my_positions, seed)
        else:
            known = {each.position: each for each in before.episodes}
            written = [known[position] for position in my_positions]
        episodes: list[Episode] = []
        size = self.ctx.resources.micro_batch_size or len(mine)
        for start in range(0, len(mine), size):
            require_going_on(self.ctx)
            episodes += self.judge(written[start : start + size], my_rows[start : start + size])
        found = self.together(self.reward(episodes, my_rows))
        experience = Experience([found[position] for position in positions])
        self.say_troubles(experience)
        return experience

    def share_of(self, count: int) -> list[int]:
        """Which of so many prompts this process completes.

        Where the processes cannot share evenly, the first ones are completed once more: under ZeRO-3 all must do the same
        number of forward passes.
        """
        world = self.ctx.world
        share = math.ceil(count / world.size)
        return [index % count for index in range(world.rank * share, (world.rank + 1) * share)]

    def together(self, mine: list[Episode] | RewardError | Abandoned) -> dict[int, Episode]:
        """Position -> episode, of all processes. Raises in all of them what is wrong in any."""
        parts = from_all(mine)
        require_all_scored(parts)
        return {each.position: each for part in reversed(parts) if isinstance(part, list) for each in reversed(part)}

    def write(self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int) -> list[Episode]:
        """A completion of each prompt, of which nothing is known but what its generator says. All processes call it together."""
        numbers = [uniforms_for(seed, place, self.params.max_new_tokens) for place in positions]
        with self.parts.generator.ready() as sampler:
            if self.parts.unfolding is not None:
                opened = [OpenEpisode(row, each) for row, each in zip(rows, numbers, strict=True)]
                self.parts.unfolding.unfold(opened, functools.partial(self.sample, sampler))
                return [each.closed(position) for each, position in zip(opened, positions, strict=True)]
            sampled = self.sample(sampler, [row.ids for row in rows], numbers)
        return [unjudged(position, row, each) for position, row, each in zip(positions, rows, sampled, strict=True)]

    def write_alone(
        self, sampler: Sampler, rows: Sequence[PromptRow], positions: Sequence[int], seed: int
    ) -> list[Episode]:
        """What `write` gives, of completions of one turn, without a word to the other processes."""
        numbers = [uniforms_for(seed, place, self.params.max_new_tokens) for place in positions]
        size = self.parts.generator.chunk_size
        sampled: list[Sampled] = []
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            sampled += self.sample_in_room(sampler, [row.ids for row in rows[chunk]], numbers[chunk])
        return [unjudged(position, row, each) for position, row, each in zip(positions, rows, sampled, strict=True)]

    def sample(
        self, sampler: Sampler, prompts: Sequence[Sequence[int]], numbers: Sequence[NDArray[np.float64]], turn: int = 0
    ) -> list[Sampled]:
        """What follows each prompt, of at most as many tokens as it has numbers, in batches as the generator wants them.

        All processes call it together, in turns after the first each with as many prompts as it has left.
        """
        size = self.parts.generator.chunk_size
        starts = range(0, max(from_all(len(prompts))) if turn else len(prompts), size)
        sampled: list[Sampled] = []
        for done, start in enumerate(starts):
            require_going_on(self.ctx)
            chunk = slice(start, start + size)
            sampled += self.sample_in_room(sampler, prompts[chunk], numbers[chunk])
            if len(starts) > 1:
                what = f"chunks of turn {turn + 1}" if turn else "chunks of completions"
                self.ctx.journal.write("progress", what=what, done=done + 1, total=len(starts))
        return sampled

    def sample_in_room(
        self, sampler: Sampler, prompts: Sequence[Sequence[int]], numbers: Sequence[NDArray[np.float64]]
    ) -> list[Sampled]:
        """What follows each prompt of a batch, though no row is read beyond the places that the model was checked to have.

        A row that has ended is read on with padding until the last of its batch has ended. Where that would be too far for
        one, the others are asked once more without it; of first turns none is, because all may write as much.
        """
        room = self.params.max_prompt_tokens + self.params.max_new_tokens
        found: list[list[Sampled]] = [[] for _ in prompts]
        texts, left = [list(each) for each in prompts], list(numbers)
        going = list(range(len(prompts)))
        while going:
            width = min(max(len(left[row]) for row in going), *(room - len(texts[row]) for row in going))
            uniforms_BK = np.stack([np.pad(left[row], (0, max(0, width - len(left[row]))))[:width] for row in going])
            written = sampler.sample(
                [texts[row] for row in going],
                uniforms_BK,
                stop_ids=self.parts.stop_ids,
                temperature=self.params.temperature,
            )
            for row, each in zip(going, written, strict=True):
                part = at_most(each, len(left[row]))
                found[row].append(part)
                texts[row], left[row] = texts[row] + part.ids.tolist(), left[row][len(part.ids) :]
            going = [row for row in going if not found[row][-1].ended and len(left[row])]
        return [as_one(parts) for parts in found]

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
            replace(each, **{name: said_only(each, array[index, : len(each.ids)]) for name, array in arrays.items()})
            for index, each in enumerate(episodes)
        ]

    def reward(self, episodes: Sequence[Episode], rows: Sequence[PromptRow]) -> list[Episode] | RewardError | Abandoned:
        """The episodes with what they are worth; or why one of them is not scored, which the others are to know too."""
        samples = [
            Sample(row.index, row.prompt, self.completion_of(each), row.row)
            for each, row in zip(episodes, rows, strict=True)
        ]
        try:
            rewards, troubles = self.parts.scorer.score(samples, lambda: require_going_on(self.ctx))
        except (RewardError, Abandoned) as error:
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

        if self.params.episodes is not None:
            self.say_troubles_of_turns(experience)

    def say_troubles_of_turns(self, experience: Experience) -> None:
        """Says what went wrong where episodes went on."""
        unfolded = [(each.row_index, each.unfolded) for each in experience.episodes if each.unfolded is not None]
        found = [(row_index, trouble) for row_index, each in unfolded for trouble in each.troubles]
        if found:
            words = ", ".join(f"{count} {word}" for word, count in Counter(each.word for _, each in found).items())
            self.ctx.journal.note(
                f"episodes: trouble with {len(found)} observations ({words}), for example of row {found[0][0] + 1}:"
                f" {found[0][1].what}"
            )
        if short := sum(each.is_cut_short for _, each in unfolded):
            self.ctx.journal.note(
                f"episodes: {short} of {len(unfolded)} ended because what was observed did not fit in max_new_tokens"
            )

    def completion_of(self, episode: Episode) -> Completion:
        """What rewards see: of an episode of several turns the last one, with those before it."""
        if episode.unfolded is None:
            return Completion(self.text_of(episode), len(episode.ids), episode.ended)
        return Completion(episode.unfolded.last, episode.num_said, episode.ended, episode.unfolded.turns)

    def text_of(self, episode: Episode) -> str:
        """What the policy wrote, and read, without the token that ends it. Other special tokens stand in it as they are spelled."""
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
            **metrics_of_turns(experience, self.params.episodes),
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


def at_most(sampled: Sampled, limit: int) -> Sampled:
    """The first `limit` tokens of it."""
    if len(sampled.ids) <= limit:
        return sampled
    return Sampled(sampled.ids[:limit], sampled.logprobs[:limit], ended=False)


def as_one(parts: Sequence[Sampled]) -> Sampled:
    """What was written in several parts, as one."""
    if len(parts) == 1:
        return parts[0]
    ids, logprobs = (np.concatenate([getattr(each, name) for each in parts]) for name in ("ids", "logprobs"))
    return Sampled(ids, logprobs, parts[-1].ended)


def said_only(episode: Episode, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers of the episode's tokens, 0 for those that the policy only read."""
    return np.where(episode.observed, np.float32(0), numbers) if len(episode.observed) else numbers


def metrics_of_turns(experience: Experience, params: EpisodeParams | None) -> Metrics:
    """Means over episodes of the policy's turns and of the tokens that it read; and how many episodes or observations were cut."""
    if params is None:
        return {}
    unfolded = [each.unfolded for each in experience.episodes if each.unfolded is not None]
    return {
        "turns": float(np.mean([each.num_turns for each in unfolded])),
        "observation_tokens": float(np.mean([len(each.ids) - each.num_said for each in experience.episodes])),
        "observations_cut": float(sum(each.num_cut for each in unfolded)),
        "episodes_cut_short": float(sum(each.is_cut_short for each in unfolded)),
        "episodes_of_max_turns": float(sum(each.num_turns == params.max_turns for each in unfolded)),
        "errors_episodes": float(sum(len(each.troubles) for each in unfolded)),
    }


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
