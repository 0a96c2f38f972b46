"""A policy trained on its own completions: `align(ctx, params, algorithm)`, the loop that they all share.

A rollout: completions of the next prompts, what they are worth, and what the policy, its reference and its critic say of
every token (rollout.py). Then some passes over them in minibatches, each one optimizer step (learning.py). What
distinguishes the algorithms is how advantages come of rewards, and whether the KL penalty is part of the reward or of the
loss: an `Algorithm` (parts.py).

Nothing here draws from a global random generator. Completions, prompts and minibatches are functions of (seed, position),
so that neither a restart nor the number of processes changes them. Log-probabilities are those of a policy without dropout,
which is proven before the first rollout (quiet.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import Preempted
from pipeline.stage import Context
from pipeline.store.numbers import require_finite
from stages.lib.formulas import policy_gradient as pg
from stages.lib.formulas.calibration import wins
from stages.lib.on_policy.background import background_of
from stages.lib.on_policy.dynamic_sampling import Drawn, draw_groups
from stages.lib.on_policy.experience import Experience
from stages.lib.on_policy.pair_learning import make_learner
from stages.lib.on_policy.pair_params import PairParams
from stages.lib.on_policy.params import GroupParams, OnPolicyParams
from stages.lib.on_policy.parts import Algorithm, Aligned, Parts, Progress
from stages.lib.on_policy.restoring import identity, say_what_was_restored
from stages.lib.on_policy.rollout import Rollouts, require_going_on, require_like_generator
from stages.lib.processes.collectives import barrier, from_main
from stages.lib.processes.joining import join_processes, use_threads
from stages.lib.text.prompts import PromptRow, Prompts
from stages.lib.training.evaluating import UNTRAINED, Metrics, StopRequested
from stages.lib.training.params import Batch, derive_batch, learning_rate_factor
from stages.lib.training.resuming import load_saved
from stages.lib.training.scheduling import ScheduledData, seed_of
from stages.lib.training.state import find_measured, find_saved, save_checkpoint

HELDOUT = 1
"""Keeps the random numbers of held-out completions apart from those of training."""

FIRST_SCORES = "scores"
"""Of the first held-out measurement of pairs, what each completion was worth: what later ones are compared with."""


@dataclass
class Aligner:
    """One run of the loop."""

    ctx: Context
    params: OnPolicyParams
    algorithm: Algorithm
    parts: Parts
    progress: Progress
    batch: Batch

    def __post_init__(self) -> None:
        num_prompts = self.params.rollouts * self.params.rollout_batch_size // self.params.group_size
        self.schedule = ScheduledData(self.parts.train, self.ctx.seed, num_prompts)
        self.rollouts = Rollouts(self.ctx, self.params, self.parts)
        self.background = background_of(self.ctx, self.params, self.parts, self.rollouts)
        self.learner = make_learner(self.ctx, self.params, self.algorithm, self.parts, self.batch)
        self.saved_at = self.progress.step

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
                self.begin_next(rollout)
                self.learn(rollout)
                self.keep_next()
                last = self.finish_rollout(rollout)
            after = self.heldout()
        except StopRequested:
            self.save()
            raise Preempted(f"at step {progress.step} of {params.total_steps}") from None
        finally:
            if self.background is not None:
                self.background.abandon()
        assert progress.before is not None
        return Aligned(progress.before, after, last or self.logged_rollout(), params.total_steps)

    def evaluation_is_due(self, rollout: int) -> bool:
        every = self.params.evaluate_every_rollouts
        return rollout == 0 or (every is not None and rollout % every == 0)

    # Rollouts

    def collect(self, rollout: int) -> None:
        """The experience of a rollout, with advantages, and what to log of it."""
        params, progress = self.params, self.progress
        started = time.monotonic()
        written_before = progress.written is not None
        drawn = self.draw(rollout)
        experience = drawn.experience
        require_like_generator(experience, params.max_logprob_mismatch)
        scores_N = self.rollouts.scores(experience)
        self.say_if_equal(rollout, scores_N)
        if params.normalize_rewards:
            progress.moments.update(scores_N)
            scores_N = progress.moments.normalize(scores_N)
        if params.reward_clip is not None:
            scores_N = scores_N.clamp(-params.reward_clip, params.reward_clip)
        coefficient = progress.controller.coefficient
        advantages_NK, returns_NK, logged = self.algorithm.advantages(experience, scores_N, coefficient)
        progress.experience = self.learner.taught_by(experience.with_advantages(advantages_NK, returns_NK))
        progress.drawn += drawn.num_completions
        progress.sums, progress.written = {}, None
        seconds = time.monotonic() - started
        progress.collected = {
            **self.rollouts.describe(experience),
            "kl_coefficient": coefficient,
            "reward_trained_on": float(scores_N.mean()),
            "advantage_mean": float(pg.masked_mean(advantages_NK, experience.mask)),
            "advantage_deviation": float(pg.masked_variance(advantages_NK, experience.mask).sqrt()),
            **logged,
            **drawn.logged,
            "rollout_seconds": round(seconds, 3),
            **(
                {} if written_before else {"rollout_tokens_per_second": round(drawn.num_tokens / max(seconds, 1e-9), 1)}
            ),
            "samples": self.rollouts.samples(experience),
        }
        if params.mask_truncated_completions:
            progress.collected["completions_left_out"] = float((1 - experience.ended).sum())

    def draw(self, rollout: int) -> Drawn:
        """What the rollout learns from: the completions of the next prompts, or of those among them that teach something."""
        params = self.params
        sampling = getattr(params, "dynamic_sampling", None)
        if sampling is None:
            experience = self.complete(self.positions_of(rollout), self.progress.written)
            return Drawn(experience, len(experience), float(experience.lengths.sum()))
        assert isinstance(params, GroupParams)
        scorer, scores = self.parts.scorer, self.rollouts.scores
        drawn = draw_groups(params, sampling, self.progress.drawn, self.complete, scores, scorer.names)
        if drawn.note:
            self.ctx.journal.note(f"rollout {rollout + 1}: {drawn.note}")
        return drawn

    def positions_of(self, rollout: int) -> range:
        """Where the completions of a rollout stand in training."""
        size = self.params.rollout_batch_size
        return range(rollout * size, (rollout + 1) * size)

    def rows_at(self, positions: Sequence[int]) -> list[PromptRow]:
        """The prompts that stand at these positions of training."""
        group = self.params.group_size
        return [self.parts.train.rows[self.schedule.index(position // group)] for position in positions]

    def complete(self, positions: Sequence[int], before: Experience | None = None) -> Experience:
        """The completions at these positions: of the prompts that stand there, with random numbers of their own, if not from before."""
        return self.rollouts.complete(self.rows_at(positions), list(positions), self.ctx.seed, before)

    def begin_next(self, rollout: int) -> None:
        """Has the completions of the next rollout written in the background, unless they are there or there is none."""
        if self.background is not None and self.progress.written is None and rollout + 1 < self.params.rollouts:
            positions = self.positions_of(rollout + 1)
            self.background.begin(self.rows_at(positions), list(positions), self.ctx.seed)

    def keep_next(self) -> None:
        """Waits for what is written in the background, and keeps it for the next rollout."""
        if self.background is not None and (written := self.background.finish()) is not None:
            self.progress.written, self.progress.collected["background_seconds"] = written

    def say_if_equal(self, rollout: int, scores_N: Tensor) -> None:
        """Says where no completion is better than another: only the KL penalty is left to learn from, if there is one."""
        if bool(pg.all_equal(scores_N.view(1, -1))):
            value = float(scores_N[0])
            self.ctx.journal.note(
                f"rollout {rollout + 1}: all {len(scores_N)} rewards are equal ({value:.4g}): there is nothing to learn from them"
            )

    # Learning

    def learn(self, rollout: int) -> None:
        """The passes over a rollout's experience, from where they stand."""
        params, progress = self.params, self.progress
        assert progress.experience is not None
        end = (rollout + 1) * params.rollout_steps
        while progress.step < end:
            require_going_on(self.ctx)
            epoch, number = divmod(progress.step - rollout * params.rollout_steps, params.passes_steps)
            minibatches = progress.experience.minibatches(
                self.ctx.seed,
                rollout,
                epoch,
                params.global_batch_size,
                completions_per_row=params.completions_per_row,
            )
            chosen = minibatches[number]
            stats = self.learner.optimize(progress.experience, chosen, progress.step)
            progress.step += 1
            self.log_step(stats)
            if params.max_policy_kl is not None and stats["policy_kl"] > params.max_policy_kl:
                progress.step, progress.sums["passes_ended_early"] = end, 1.0
            if progress.step < end:  # else the rollout is finished before anything is saved
                self.save_if_due()

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
            return {name: value for name, value in measured.items() if name != FIRST_SCORES}
        rows = self.parts.heldout.rows[: self.params.heldout_prompts]
        experience = self.rollouts.complete(rows, list(range(len(rows))), seed_of(self.ctx.seed, HELDOUT))
        described = self.rollouts.describe(experience)
        metrics = {f"heldout_{name}": value for name, value in described.items() if not name.startswith("generator")}
        first: dict[str, Any] = {}
        if isinstance(self.params, PairParams):
            scores_N = self.rollouts.scores(experience)
            if step == 0:
                first[FIRST_SCORES] = scores_N.tolist()
            else:
                metrics["heldout_win_rate"] = self.win_rate(scores_N)
        require_finite(
            metrics, f"step {step}", "Lower the learning rate, or look at the rewards." if step else UNTRAINED
        )
        self.ctx.journal.write("heldout", step=step, total_steps=self.params.total_steps, **metrics, **first)
        return metrics

    def win_rate(self, scores_N: Tensor) -> float:
        """How often a held-out completion is worth more than that of the policy that training began with, of the same prompt
        and drawn with the same random numbers; ties count one half.
        """

        def first_scores() -> list[float]:
            return next(event[FIRST_SCORES] for event in self.ctx.journal.events("heldout") if event["step"] == 0)

        return float(wins(scores_N, torch.tensor(from_main(first_scores), dtype=scores_N.dtype)).mean())

    def save_if_due(self) -> None:
        """Saves if a multiple of `save_every_steps` has been passed since the last time, or this is the last step."""
        every, step = self.ctx.resources.save_every_steps, self.progress.step
        if step == self.params.total_steps or step // every > self.saved_at // every:
            self.save()
            self.saved_at = step

    def save(self) -> None:
        """Writes a checkpoint of this moment, unless there is one or nothing has been learned. All processes call it."""
        progress, total = self.progress, self.params.total_steps
        if progress.step == 0:
            return
        self.keep_next()
        content = {**identity(self.ctx, self.params, self.parts.train), **progress.as_dict()}
        save_checkpoint(
            self.ctx, self.parts.engine, progress.step, total, self.parts.parameters, content, progress.save
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
    find = partial(find_saved, ctx, identity(ctx, params, prompts), Progress.of)
    saved = find()
    parts = build(device, batch)
    use_threads(ctx.resources)
    progress = Progress(controller=algorithm.controller())
    saved = load_saved(parts.engine, saved, find)
    if saved is not None:
        progress = Progress.of(saved)
        say_what_was_restored(ctx, params, progress, saved)
    barrier()
    ctx.journal.note(
        f"{params.rollouts} rollouts of {params.rollout_batch_size} completions, each {params.epochs_per_rollout} times in"
        f" steps of {batch}: {params.total_steps:,} steps"
    )
    aligner = Aligner(ctx, params, algorithm, parts, progress, batch)
    return aligner.run(), parts
