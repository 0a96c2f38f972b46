"""A policy trained on its own completions: `align(ctx, params, algorithm)`, the loop that PPO, GRPO and RLOO share.

A rollout: completions of the next prompts, what they are worth, and what the policy, its reference and its critic say of
every token. Then some passes over them in minibatches, each one optimizer step. What distinguishes the algorithms is how
advantages come of rewards, and whether the KL penalty is part of the reward or of the loss: an `Algorithm`.

Nothing here draws from a global random generator. Completions, prompts and minibatches are functions of (seed, position),
so that neither a restart nor the number of processes changes them. Log-probabilities are those of a policy without dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Preempted, Problem
from pipeline.stage import Context
from stages.lib.formulas import policy_gradient as pg
from stages.lib.formulas.token_losses import Tensors
from stages.lib.generating.generator import Generator
from stages.lib.generating.sampling import uniforms_for
from stages.lib.on_policy.actor_critic import ActorCritic, Judged
from stages.lib.on_policy.experience import Episode, Experience, collate_episodes
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.ptx import ChatMixture
from stages.lib.on_policy.rewards import Completion, Sample
from stages.lib.on_policy.scoring import Scorer
from stages.lib.processes.collectives import all_reduce_sum, any_process, barrier, from_all, from_main
from stages.lib.processes.joining import join_processes, use_threads
from stages.lib.text.prompts import PromptRow, Prompts
from stages.lib.training.engine import Engine
from stages.lib.training.evaluating import Metrics, StopRequested
from stages.lib.training.forecast import CHECKPOINT_BYTES_PER_PARAMETER
from stages.lib.training.params import Batch, derive_batch, learning_rate_factor
from stages.lib.training.scheduling import ScheduledData, fingerprint, seed_of
from stages.lib.training.state import check_checkpoint, find_measured, write_state

EXPERIENCE = "experience.npz"


HELDOUT = 1
"""Keeps the random numbers of held-out completions apart from those of training."""


class Algorithm(Protocol):
    """What distinguishes the algorithms."""

    kl_in_loss: bool
    """Whether the divergence from the reference is a term of the loss, instead of a part of the reward."""
    value_coefficient: float
    """Weight of the critic's loss; 0 without a critic."""

    def controller(self) -> pg.KLController:
        """The coefficient of the KL penalty at the beginning, and how it is led."""

    def advantages(
        self, experience: Experience, scores_N: Tensor, kl_coefficient: float
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Advantages and returns, each N x K (returns are what a critic learns), and what is worth logging of them."""

    def value_loss(self, values_BK: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        """Loss and clipped share of the critic, per token. Only called where there is one."""


@dataclass
class Progress:
    """How far the run is, and what it carries from one rollout to the next. All of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done, those of passes that were ended early counted as well."""
    controller: pg.KLController = field(default_factory=lambda: pg.KLController(0.0))
    moments: pg.RunningMoments = field(default_factory=pg.RunningMoments)
    before: Metrics | None = None
    collected: dict[str, Any] = field(default_factory=dict)
    """What was logged of the rollout that is being learned from."""
    sums: dict[str, float] = field(default_factory=dict)
    """What its optimizer steps so far add up to."""
    experience: Experience | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "controller": asdict(self.controller),
            "moments": asdict(self.moments),
            "before": self.before,
            "collected": self.collected,
            "sums": self.sums,
        }

    @classmethod
    def load(cls, folder: Path, saved: Mapping[str, Any]) -> Progress:
        path = folder / EXPERIENCE
        return cls(
            step=saved["step"],
            controller=pg.KLController(**saved["controller"]),
            moments=pg.RunningMoments(**saved["moments"]),
            before=saved["before"],
            collected=saved["collected"],
            sums=saved["sums"],
            experience=Experience.load(path) if path.exists() else None,
        )


@dataclass
class Aligned:
    """What the loop returns in every process."""

    before: Metrics
    after: Metrics
    last_rollout: Metrics
    """What the last line of the journal says of a rollout."""
    steps: int


@dataclass
class Parts:
    """What the loop works with."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    train: Prompts
    heldout: Prompts
    engine: Engine
    module: ActorCritic
    generator: Generator
    rates: list[float]
    """Highest learning rate of each of the optimizer's groups."""
    scorer: Scorer
    reference: Callable[..., Judged] | None
    """The reference's judgement, without gradients; None where nothing holds the policy to one."""
    mixture: ChatMixture | None
    parameters: int
    """Of all that is in memory for training."""
    policy_parameters: int
    """Of the policy alone, as it is published."""


class Aligner:
    """One run of the loop."""

    def __init__(
        self, ctx: Context, params: OnPolicyParams, algorithm: Algorithm, parts: Parts, progress: Progress, batch: Batch
    ) -> None:
        self.ctx, self.params, self.algorithm, self.parts, self.progress = ctx, params, algorithm, parts, progress
        self.batch = batch
        num_prompts = params.rollouts * params.rollout_batch_size // params.group_size
        self.schedule = ScheduledData(parts.train, ctx.seed, num_prompts)
        self.padding_id = parts.tokenizer.pad_token_id or 0
        self.chunk_size = ctx.resources.micro_batch_size or 2**31
        self.saved_at = progress.step

    # The loop

    def run(self) -> Aligned:
        """Trains from where `progress` stands. Raises `Preempted` after a save when the process was asked to stop."""
        params, progress = self.params, self.progress
        last: Metrics = {}
        try:
            for rollout in range(progress.step // params.rollout_steps, params.rollouts):
                if progress.experience is None:
                    if self.evaluation_is_due(rollout):
                        measured = self.heldout()
                        progress.before = measured if rollout == 0 else progress.before
                    self.collect(rollout)
                self.learn(rollout)
                last = self.finish_rollout(rollout)
            after = self.heldout()
        except StopRequested:
            self.save()
            raise Preempted(f"at step {progress.step} of {params.total_steps}") from None
        assert progress.before is not None
        return Aligned(progress.before, after, last or self.logged_rollout(), params.total_steps)

    def evaluation_is_due(self, rollout: int) -> bool:
        every = self.params.evaluate_every_rollouts
        return rollout == 0 or (every is not None and rollout % every == 0)

    def require_going_on(self) -> None:
        """Raises `StopRequested`, in all processes at once, if one was asked to stop."""
        if any_process(self.ctx.stop_requested()):
            raise StopRequested

    # Rollouts

    def collect(self, rollout: int) -> None:
        """The experience of a rollout, with advantages, and what to log of it."""
        params, progress = self.params, self.progress
        started = time.monotonic()
        first = rollout * params.rollout_batch_size
        positions = range(first, first + params.rollout_batch_size)
        rows = [self.parts.train.rows[self.schedule.index(position // params.group_size)] for position in positions]
        experience = self.complete(rows, list(positions), self.ctx.seed)
        require_like_generator(experience, params.max_logprob_mismatch)
        scores_N = self.scores(experience)
        if params.normalize_rewards:
            progress.moments.update(scores_N)
            scores_N = progress.moments.normalize(scores_N)
        if params.reward_clip is not None:
            scores_N = scores_N.clamp(-params.reward_clip, params.reward_clip)
        coefficient = progress.controller.coefficient
        advantages_NK, returns_NK, logged = self.algorithm.advantages(experience, scores_N, coefficient)
        progress.experience = experience.with_advantages(advantages_NK, returns_NK)
        progress.sums = {}
        seconds = time.monotonic() - started
        progress.collected = {
            **self.describe(experience),
            "kl_coefficient": coefficient,
            "reward_trained_on": float(scores_N.mean()),
            "advantage_mean": float(pg.masked_mean(advantages_NK, experience.mask)),
            "advantage_deviation": float(pg.masked_variance(advantages_NK, experience.mask).sqrt()),
            **logged,
            "rollout_seconds": round(seconds, 3),
            "rollout_tokens_per_second": round(float(experience.lengths.sum()) / max(seconds, 1e-9), 1),
            "samples": self.samples(experience),
        }

    def complete(self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int) -> Experience:
        """A completion of each prompt, judged and scored, each process its share; the same in all of them.

        Where the processes cannot share evenly, the first prompts are completed once more, and not counted: under
        ZeRO-3 all must do the same number of forward passes.
        """
        world = self.ctx.world
        share = math.ceil(len(rows) / world.size)
        mine = [index % len(rows) for index in range(world.rank * share, (world.rank + 1) * share)]
        episodes: list[Episode] = []
        size = self.parts.generator.chunk_size
        chunks = [mine[start : start + size] for start in range(0, share, size)]
        with self.parts.generator.ready() as sampler:
            sampled = []
            for done, chunk in enumerate(chunks):
                self.require_going_on()
                numbers = [uniforms_for(seed, positions[index], self.params.max_new_tokens) for index in chunk]
                sampled += sampler.sample(
                    [rows[index].ids for index in chunk],
                    np.stack(numbers),
                    stop_ids=self.parts.stop_ids,
                    temperature=self.params.temperature,
                )
                if len(chunks) > 1:
                    self.ctx.journal.write("progress", what="chunks of completions", done=done + 1, total=len(chunks))
        for start in range(0, share, self.chunk_size):
            self.require_going_on()
            part = slice(start, start + self.chunk_size)
            episodes += self.judge(
                [
                    Episode(
                        position=positions[index],
                        row_index=rows[index].index,
                        prompt_ids=np.asarray(rows[index].ids, dtype=np.int64),
                        ids=each.ids,
                        ended=each.ended,
                        rewards=np.zeros(0),
                        generator_logprobs=each.logprobs,
                        logprobs=each.logprobs,
                        ref_logprobs=each.logprobs,
                        values=np.zeros_like(each.logprobs),
                    )
                    for index, each in zip(mine[part], sampled[part], strict=True)
                ],
                [rows[index] for index in mine[part]],
            )
        found = {each.position: each for part in from_all(episodes) for each in part}
        return Experience([found[position] for position in positions])

    def judge(self, episodes: Sequence[Episode], rows: Sequence[PromptRow]) -> list[Episode]:
        """The episodes with their rewards, and with what policy, critic and reference say of each token."""
        batch = self.to_device(collate_episodes(episodes, self.padding_id))
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
        rewards = self.parts.scorer.score(
            [
                Sample(row.index, row.prompt, Completion(self.text_of(each), len(each.ids), each.ended), row.row)
                for each, row in zip(episodes, rows, strict=True)
            ]
        )
        return [
            Episode(
                **{
                    **vars(each),
                    "rewards": rewards[index],
                    **{name: array[index, : len(each.ids)] for name, array in arrays.items()},
                }
            )
            for index, each in enumerate(episodes)
        ]

    def text_of(self, episode: Episode) -> str:
        """What the policy wrote, without the token that ends it. Other special tokens stand in it as they are spelled."""
        ids = episode.ids[:-1] if episode.ended else episode.ids
        text = self.parts.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

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

    # Learning

    def learn(self, rollout: int) -> None:
        """The passes over a rollout's experience, from where they stand."""
        params, progress = self.params, self.progress
        assert progress.experience is not None
        end = (rollout + 1) * params.rollout_steps
        while progress.step < end:
            self.require_going_on()
            epoch, number = divmod(progress.step - rollout * params.rollout_steps, params.passes_steps)
            chosen = progress.experience.minibatches(self.ctx.seed, rollout, epoch, params.global_batch_size)[number]
            stats = self.optimize(progress.experience, chosen)
            progress.step += 1
            self.log_step(stats)
            if params.max_policy_kl is not None and stats["policy_kl"] > params.max_policy_kl:
                progress.step, progress.sums["passes_ended_early"] = end, 1.0
            if progress.step < end:  # else the rollout is finished before anything is saved
                self.save_if_due()

    def optimize(self, experience: Experience, chosen: Sequence[int]) -> Metrics:
        """One optimizer step on the chosen episodes, all processes together; its sums divided by what they count."""
        started = time.monotonic()
        params, ctx, engine = self.params, self.ctx, self.parts.engine
        tokens = float(sum(len(experience.episodes[index].ids) for index in chosen))
        share = len(chosen) // ctx.world.size
        mine = chosen[ctx.world.rank * share : (ctx.world.rank + 1) * share]
        micro = self.batch.micro_batch_size
        batches = [
            self.to_device(
                collate_episodes([experience.episodes[i] for i in mine[start : start + micro]], self.padding_id)
            )
            for start in range(0, share, micro)
        ]
        torch.manual_seed(seed_of(ctx.seed, self.progress.step))
        totals: dict[str, float] = {}
        if self.parts.mixture is not None:
            self.parts.mixture.add_gradients(engine, self.progress.step, params.ptx_coefficient, totals)
        for number, batch in enumerate(batches):
            engine.backward(
                lambda batch=batch: self.loss(batch, tokens, totals),  # type: ignore[misc]
                last=number == len(batches) - 1,
            )
        factor = learning_rate_factor(params, self.progress.step, params.total_steps)
        norm = engine.step([rate * factor for rate in self.parts.rates])
        names = sorted(totals)
        sums = dict(zip(names, all_reduce_sum([totals[name] for name in names]), strict=True))
        stats = {name: value if name == "ptx_loss" else value / tokens for name, value in sums.items()}
        deviation = max(0.0, stats.pop("ratio_squares") - stats["ratio"] ** 2) ** 0.5
        stats |= {"ratio_deviation": deviation, "gradient_norm": norm}
        self.require_finite(stats)
        stats |= {"tokens": tokens, "seconds": time.monotonic() - started}
        return stats

    def loss(self, batch: Tensors, tokens: float, totals: dict[str, float]) -> Tensor:
        """This micro batch's part of the loss, a mean over the `tokens` of all micro batches of all processes.

        L = L_policy + c_value L_value - c_entropy H (+ beta KL), each summed over tokens and divided by their number: so
        neither micro batch nor number of processes changes it. Adds the sums of what is logged to `totals`.
        """
        params = self.params
        mask = batch["mask"]
        judged: Judged = self.parts.engine.forward(batch["input_ids"], batch["attention_mask"], mask.shape[1])
        # exp of what the policy says of padding may be infinite, and 0 times that is no number.
        logp, old = judged.logprobs.masked_fill(mask == 0, 0.0), batch["logprobs"]
        policy, clipped = pg.clipped_policy_loss(
            logp,
            old,
            batch["advantages"],
            clip_low=params.clip_ratio,
            clip_high=params.clip_ratio_high or params.clip_ratio,
        )
        weights = pg.mismatch_weights(old, batch["generator_logprobs"], cap=params.mismatch_cap)
        terms = {"policy_loss": policy * weights, "entropy": judged.entropy}
        loss = terms["policy_loss"] * mask
        if params.entropy_coefficient:
            loss = loss - params.entropy_coefficient * judged.entropy * mask
        if self.algorithm.kl_in_loss and params.kl_coefficient:
            terms["kl_loss"] = pg.KL_ESTIMATORS[params.kl_estimator](logp, batch["ref_logprobs"])
            loss = loss + params.kl_coefficient * terms["kl_loss"] * mask
        if judged.values is not None:
            terms["value_loss"], terms["value_clipped"] = self.algorithm.value_loss(judged.values, batch)
            loss = loss + self.algorithm.value_coefficient * terms["value_loss"] * mask
        with torch.no_grad():
            ratio = (logp - old).exp()
            terms |= {
                "clipped": clipped,
                "ratio": ratio,
                "ratio_squares": ratio.double().square(),  # whose mean is compared with the square of the mean
                # Of the policy that wrote the completions from the one now, estimated by k3.
                "policy_kl": pg.k3(old, logp),
                "loss": loss,
            }
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float((value.detach().double() * mask).sum())
        return loss.sum() / tokens * self.ctx.world.size

    def to_device(self, batch: Tensors) -> Tensors:
        return {name: tensor.to(self.parts.engine.device) for name, tensor in batch.items()}

    def require_finite(self, stats: Metrics) -> None:
        bad = [name for name, value in stats.items() if not math.isfinite(value)]
        if bad:
            raise DataError(
                Problem(
                    f"step {self.progress.step + 1}",
                    f"{bad[0]} is {stats[bad[0]]}",
                    "Lower the learning rate, lengthen the warmup, or look at the rewards.",
                )
            )

    # Logging

    def log_step(self, stats: Metrics) -> None:
        """Adds an optimizer step to the rollout's sums, and writes a line when one is due."""
        params, progress = self.params, self.progress
        for name, value in {**stats, "num_steps": 1.0}.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        step = progress.step
        rate = self.parts.rates[0] * learning_rate_factor(params, step - 1, params.total_steps)
        progress.collected["learning_rate"] = rate
        if step % self.ctx.resources.log_every_steps and step != params.total_steps:
            return
        shown = {name: value for name, value in stats.items() if name not in ("tokens", "seconds")}
        self.ctx.journal.write(
            "step",
            step=step,
            total_steps=params.total_steps,
            learning_rate=rate,
            tokens_per_second=round(stats["tokens"] / max(stats["seconds"], 1e-9), 1),
            seconds=round(stats["seconds"], 3),
            **shown,
        )

    def finish_rollout(self, rollout: int) -> Metrics:
        """Writes the rollout's line, leads the KL coefficient, and saves when due. Returns the line's numbers."""
        params, progress = self.params, self.progress
        sums = dict(progress.sums)
        steps, seconds, tokens = sums.pop("num_steps"), sums.pop("seconds"), sums.pop("tokens")
        early = sums.pop("passes_ended_early", 0.0)
        collected = dict(progress.collected)
        samples = collected.pop("samples")
        line: Metrics = {
            **collected,
            **{name: value / steps for name, value in sums.items()},
            "optimizer_steps": steps,
            "passes_ended_early": early,
            "update_seconds": round(seconds, 3),
            "update_tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }
        self.ctx.journal.write(
            "rollout",
            rollout=rollout + 1,
            total_rollouts=params.rollouts,
            step=progress.step,
            total_steps=params.total_steps,
            **line,
            samples=samples,
        )
        progress.controller.update(float(line["kl"]), params.rollout_batch_size)
        progress.experience, progress.collected, progress.sums = None, {}, {}
        self.save_if_due()
        return line

    def logged_rollout(self) -> Metrics:
        """The numbers of the newest rollout line, for a run that resumed after its last rollout."""
        line: Mapping[str, Any] = list(self.ctx.journal.events("rollout"))[-1]
        return {name: value for name, value in line.items() if isinstance(value, int | float)}

    def heldout(self) -> Metrics:
        """What the policy makes of held-out prompts, from the journal if it stands there. Raises `StopRequested`."""
        step = self.progress.step
        if measured := from_main(lambda: find_measured(self.ctx.journal, step)):
            return measured
        rows = self.parts.heldout.rows[: self.params.heldout_prompts]
        experience = self.complete(rows, list(range(len(rows))), seed_of(self.ctx.seed, HELDOUT))
        described = self.describe(experience)
        metrics = {f"heldout_{name}": value for name, value in described.items() if not name.startswith("generator")}
        self.ctx.journal.write("heldout", step=step, total_steps=self.params.total_steps, **metrics)
        return metrics

    # Checkpoints

    def save_if_due(self) -> None:
        """Saves if a multiple of `save_every_steps` has been passed since the last time, or this is the last step."""
        every, step = self.ctx.resources.save_every_steps, self.progress.step
        if step == self.params.total_steps or step // every > self.saved_at // every:
            self.save()
            self.saved_at = step

    def save(self) -> None:
        """Writes a checkpoint of this moment, unless there is one or nothing has been learned. All processes call it."""
        step, checkpoints = self.progress.step, self.ctx.checkpoints
        folder = checkpoints.path(step)
        if step == 0 or from_main(lambda: folder.exists() and not checkpoints.problems(step, hashes=False)):
            return
        needed = self.parts.parameters * CHECKPOINT_BYTES_PER_PARAMETER + 2**20
        from_main(lambda: checkpoints.require_room(needed))
        self.parts.engine.save(folder)
        from_main(lambda: self.complete_checkpoint(folder, step))

    def complete_checkpoint(self, folder: Path, step: int) -> None:
        if self.progress.experience is not None:
            self.progress.experience.save(folder / EXPERIENCE)
        content = {**self.identity(), **self.progress.as_dict()}
        write_state(self.ctx, step, content)
        self.ctx.checkpoints.complete(step)
        self.ctx.checkpoints.rotate()
        self.ctx.journal.write("progress", what="checkpoint", step=step, done=step, total=self.params.total_steps)

    def identity(self) -> dict[str, Any]:
        return identity(self.ctx, self.params, self.parts.train)


def identity(ctx: Context, params: OnPolicyParams, prompts: Prompts) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that resumes from it."""
    return {
        "total_steps": params.total_steps,
        "global_batch_size": params.global_batch_size,
        "seed": ctx.seed,
        "data": fingerprint(prompts),
    }


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


def align(
    ctx: Context,
    params: OnPolicyParams,
    algorithm: Algorithm,
    build: Callable[[torch.device, Batch], Parts],
    prompts: Prompts,
) -> tuple[Aligned, Parts]:
    """Runs the loop to its end, from the checkpoint of `ctx` if there is one. All processes call it together."""
    device = join_processes(ctx)
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    progress = Progress(controller=algorithm.controller())
    saved = None
    if ctx.resume is not None:
        saved = from_main(lambda: check_checkpoint(ctx, identity(ctx, params, prompts)))
    barrier()  # The main process has written what the others are about to load.
    parts = build(device, batch)
    use_threads(ctx.resources)
    if saved is not None and ctx.resume is not None:
        progress = Progress.load(ctx.resume, saved)
        parts.engine.load(ctx.resume)
        ctx.journal.rewind(progress.step)
        write_receipt(ctx, params, progress, saved)
    barrier()
    ctx.journal.note(
        f"{params.rollouts} rollouts of {params.rollout_batch_size} completions, each {params.epochs_per_rollout} times in"
        f" steps of {batch}: {params.total_steps:,} steps"
    )
    aligner = Aligner(ctx, params, algorithm, parts, progress, batch)
    return aligner.run(), parts


def write_receipt(ctx: Context, params: OnPolicyParams, progress: Progress, saved: Mapping[str, Any]) -> None:
    """Says what was restored."""
    within = progress.experience is not None
    ctx.journal.write(
        "resume",
        step=progress.step,
        total_steps=params.total_steps,
        checkpoint=str(ctx.resume),
        restored=[
            "weights of policy and critic",
            "optimizer",
            "schedule",
            "prompt position",
            "KL coefficient",
            "reward statistics",
            *(["completions of the rollout"] if within else []),
        ],
        processes=saved["world_size"],
        kl_coefficient=progress.controller.coefficient,
    )
    where = "within a rollout, whose completions were restored" if within else "between two rollouts"
    ctx.journal.note(
        f"resumed at step {progress.step} of {params.total_steps}, {where}: weights, optimizer, schedule, prompt position,"
        f" KL coefficient {progress.controller.coefficient:.4g}, reward statistics"
    )
