"""One training loop for every stage that trains on fixed data: `train(ctx, params, ...)`.

A stage says what to learn (`Objective`), from which rows, and what to measure on held-out rows; here it is decided how that
is spread over processes, logged, saved and resumed:

- Rows come in an order that is a function of (seed, position) alone, and position p always belongs to optimizer step
  p // global_batch_size. So neither the number of processes nor the micro batch nor a restart changes what a step sees.
- A step's loss is the sum over all its rows in all processes, divided by the number of units (tokens, pairs) in all of
  them: accumulation and data parallelism average nothing on the way.
- What dropout drops of a row is a function of (seed, position), whichever process holds the row and whatever stands beside
  it: dropout.py. What else a model draws comes from a generator seeded anew for every micro batch from (seed, position), and
  is told. So no generator is ever saved.
- A loss or a gradient that is not finite ends the run before the optimizer steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import NothingSaved, Preempted
from pipeline.stage import Context
from pipeline.store.numbers import require_finite
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.formats import formats_to_publish
from stages.lib.models.generation import note_generation
from stages.lib.processes.collectives import all_reduce_sum, any_process, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.text.batches import Collate, num_tokens, with_positions
from stages.lib.training.adapted import publish_trained
from stages.lib.training.beginning import find_start, identity_of_run, in_passes, load_start, take_over_best
from stages.lib.training.carrying import Objective, carried_by, go_on, one_step
from stages.lib.training.engine import Engine, Stepped
from stages.lib.training.evaluating import UNTRAINED, Evaluator, Metrics, StopRequested
from stages.lib.training.making import make_engine
from stages.lib.training.params import (
    Batch,
    TrainingParams,
    derive_batch,
    learning_rate_factor,
    optimizer_steps,
    schedule_length,
)
from stages.lib.training.randomness import Randomness
from stages.lib.training.resuming import load_weights_of
from stages.lib.training.scheduling import ScheduledData
from stages.lib.training.soundness import require_number, require_sound, require_training_rows, require_units
from stages.lib.training.state import (
    Saved,
    TrainingProgress,
    Window,
    find_measured,
    save_checkpoint,
    write_receipt,
)
from stages.lib.training.watching import Watching


@dataclass(frozen=True)
class Trained:
    """What `train` returns in every process. The published model lies in `ctx.out`."""

    before: Metrics
    """What `evaluate` measured before the first step."""
    after: Metrics
    """What `evaluate` measured of the weights that are published. Where these are the best ones, not always those of the last
    step, also `published_step`, `last_step` and, of the last step, each metric with `_last` behind its name."""
    steps: int
    """Optimizer steps of the weights that are published."""
    parameters: int
    train_loss: float
    """Mean training loss per unit over the steps that the last line of the journal covers, up to the published step."""
    dtype: str = "fp32"
    """The number format of the published weights, or of most of them."""


LOOKED_AT = 32
"""Rows among which two are chosen to call the model with before training."""


@dataclass
class Training:
    """One run of the loop."""

    ctx: Context
    params: TrainingParams
    batch: Batch
    steps: int
    """Optimizer steps in all."""
    schedule: ScheduledData
    collate: Collate
    objective: Objective
    evaluate: Callable[[Evaluator], Metrics]
    engine: Engine
    randomness: Randomness
    rates: Sequence[float]
    """Highest learning rate of each of the optimizer's groups."""
    parameters: int
    trained_parameters: int
    identity: dict[str, Any]
    """What a checkpoint must have in common with the run that resumes from it."""
    progress: TrainingProgress
    watching: Watching
    tokens_since: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    def run(self) -> Trained:
        """Trains from where `progress` stands. Asked to stop, raises `Preempted` after a save; `NothingSaved` before step 1."""
        progress = self.progress
        self.look_at_model()
        try:
            if progress.step == 0:
                progress.before = self.heldout()
            assert progress.before is not None
            self.watching.require_measured(progress.before)
            if self.evaluation_is_due() and self.measure():  # of a step whose measurement a stop cut short
                self.save()
            self.clock = time.monotonic()
            while not self.is_over():
                self.take_step()
                self.finish_step()
            self.measure()
            return self.end(self.heldout())
        except StopRequested:
            said = Preempted(f"while measuring, at step {progress.step} of {self.steps}")
            raise (said if progress.step else NothingSaved()) from None

    def take_over(self, saved: Saved | None) -> None:
        """Brings the best weights so far over from what this run extends, if it does, and is to publish the best."""
        if saved is not None and saved.extended and self.watching.best is not None:
            self.save()
            take_over_best(self.ctx, saved, self.watching)

    def is_over(self) -> bool:
        return self.progress.step >= self.steps or self.watching.ends

    def end(self, last: Metrics) -> Trained:
        """Leaves in the engine the weights that are to be published, and tells of them. `last`: of those it holds now."""
        progress, step = self.progress, self.progress.step
        assert progress.before is not None
        if step < self.steps:
            self.ctx.journal.note(f"stopped early, after step {step} of {self.steps}: {self.watching.why_it_ends()}")
        best, after, window = self.watching.best, last, progress.window
        if best is not None:
            if best != step:
                state = load_weights_of(self.ctx, self.engine, best)
                go_on(self.objective, state)
                window, after = Window(**state["window"]), self.evaluate(self.evaluator())
            self.ctx.journal.note(self.watching.what_is_published(step, after, progress.before))
            after = {**after, **{f"{name}_last": value for name, value in last.items()}}
            after |= {"published_step": float(best), "last_step": float(step)}
        assert window.last_mean is not None
        return Trained(progress.before, after, best or step, self.parameters, window.last_mean)

    def look_at_model(self) -> None:
        """Finds out what the model draws at random, on the first rows that ask for something."""
        first = range(min(LOOKED_AT, len(self.schedule)))
        asking = [place for place in first if float(self.objective.count(self.batch_at([place])))] or [0]
        row, other = asking[0], asking[-1]
        batches = [[row], [row, row]] + ([[other], [row, other]] if other != row else [])
        exact = self.params.precision == "fp32"
        self.randomness.look(self.engine, self.loss_sum, list(map(self.batch_at, batches)), exact=exact)

    def take_step(self) -> None:
        """One optimizer step on the rows at its positions, all processes together."""
        step, engine = self.progress.step, self.engine
        batches = self.micro_batches(step)
        units = sum(float(self.objective.count(batch)) for batch in batches)
        units, tokens = all_reduce_sum([units, sum(num_tokens(batch) for batch in batches)])
        require_units(units, step + 1)
        losses: list[torch.Tensor] = []
        with one_step(self.objective, self.engine.wrapped, map(self.inputs, batches)):
            for number, batch in enumerate(batches):
                with self.randomness.of(batch, step):
                    engine.backward(partial(self.loss, batch, units, losses), last=number == len(batches) - 1)
        (loss,) = all_reduce_sum([float(torch.stack(losses).sum())])
        require_number("loss", loss / units, step + 1)
        factor = learning_rate_factor(self.params, step, schedule_length(self.params, self.steps))
        stepped = engine.step([rate * factor for rate in self.rates])
        if not stepped.taken and self.params.precision != "fp16":
            require_number("gradient norm", stepped.gradient_norm, step + 1)
        self.progress.step += 1
        self.tokens_since += tokens
        self.progress.window.add(loss / units, units)
        self.log(stepped, self.params.learning_rate * factor)

    def micro_batches(self, step: int) -> list[Tensors]:
        """This process's rows of a step, `micro_batch_size` at a time, on the CPU, where counting them makes no GPU wait."""
        micro, world = self.batch.micro_batch_size, self.ctx.world
        first = step * self.batch.global_batch_size
        starts = [first + (number * world.size + world.rank) * micro for number in range(self.batch.accumulation)]
        return [self.batch_at(range(start, start + micro)) for start in starts]

    def batch_at(self, positions: Sequence[int]) -> Tensors:
        return self.collate([self.schedule[position] for position in positions])

    def loss_sum(self, batch: Tensors) -> torch.Tensor:
        """The summed loss of a micro batch."""
        return self.objective.loss_sum(self.engine.wrapped, self.inputs(batch))

    def inputs(self, batch: Tensors) -> Tensors:
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items() if name != "positions"}

    def loss(self, batch: Tensors, units: float, losses: list[torch.Tensor]) -> torch.Tensor:
        """This micro batch's share of the step's loss, times the number of processes, which average gradients.

        Its sum, in double precision, is added to `losses`.
        """
        loss_sum = self.loss_sum(batch)
        losses.append(loss_sum.detach().double())
        return loss_sum / torch.tensor(units, dtype=loss_sum.dtype) * self.ctx.world.size

    def log(self, stepped: Stepped, learning_rate: float) -> None:
        """Writes a line of the journal when one is due."""
        ctx, step = self.ctx, self.progress.step
        # Where a measurement may end the training or choose its step, the loss up to there is told; also at the last step,
        # so that a training which extends this one tells the same as one that was so long from the beginning.
        every = self.params.evaluate_every_steps if self.params.goes_by_measurements else None
        due = step % ctx.resources.log_every_steps == 0 or (every is not None and step % every == 0)
        if not due and step != self.steps:
            return
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        tokens, self.tokens_since = self.tokens_since, 0.0
        ctx.journal.write(
            "step",
            step=step,
            total_steps=self.steps,
            loss=self.progress.window.close(goes_on=not due),
            learning_rate=learning_rate,
            gradient_norm=stepped.gradient_norm if math.isfinite(stepped.gradient_norm) else None,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 3),
            **self.engine.told(),
            **({} if stepped.taken else {"step_skipped": True}),
        )

    def finish_step(self) -> None:
        """Measures and saves where due, and stops where asked to."""
        ctx, step = self.ctx, self.progress.step
        stopping, needed = any_process(ctx.stop_requested()), False
        if not stopping and self.evaluation_is_due():
            try:
                needed = self.measure()
            except StopRequested:
                stopping = True  # measured after the restart
        if stopping or needed or step == self.steps or step % ctx.resources.save_every_steps == 0:
            self.save()
        if stopping:
            raise Preempted(f"at step {step} of {self.steps}")

    def evaluation_is_due(self) -> bool:
        every, step = self.params.evaluate_every_steps, self.progress.step
        return every is not None and 0 < step < self.steps and step % every == 0

    def measure(self) -> bool:
        """Measures at this step in training; whether its weights must be kept. Raises `StopRequested`."""
        step = self.progress.step
        metrics = self.heldout()
        self.watching.note(step, from_main(lambda: metrics))
        return self.watching.needs_checkpoint(step)

    def evaluator(self) -> Evaluator:
        return Evaluator(self.engine.wrapped, self.ctx, self.engine.device, self.batch.micro_batch_size)

    def heldout(self) -> Metrics:
        """The stage's held-out metrics at this step, from the journal if they stand there. Raises `StopRequested`."""
        ctx, step = self.ctx, self.progress.step
        if measured := from_main(lambda: find_measured(ctx.journal, step)):
            return measured
        started = time.monotonic()
        metrics = self.evaluate(self.evaluator())
        require_finite(metrics, f"step {step}", "Lower the learning rate." if step else UNTRAINED)
        ctx.journal.write("heldout", step=step, total_steps=self.steps, **metrics)
        self.clock += time.monotonic() - started
        return metrics

    def save(self) -> None:
        progress, content = self.progress, dict(self.identity)
        content |= {"window": asdict(progress.window), "before": progress.before}
        content |= carried_by(self.objective) | self.watching.carried(progress.step)
        save_checkpoint(self.ctx, self.engine, progress.step, self.steps, self.trained_parameters, content)


def train(
    ctx: Context,
    params: TrainingParams,
    *,
    make_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | Path,
    data: Sequence[dict[str, Any]],
    collate: Collate,
    objective: Objective,
    evaluate: Callable[[Evaluator], Metrics],
    stop_ids: list[int] | None = None,
    without_dropout: bool = False,
) -> Trained:
    """Trains `make_model()` on `data` and publishes it, with `tokenizer` (or the one in that folder), to `ctx.out`.

    `make_model` is called once the memory layout is known, in every process: it loads from a folder (of an input, or
    from `loading.initial_weights`), so that ZeRO-3 can split the weights while they are read. `evaluate` is called
    before the first step, after the last, and every `evaluate_every_steps`. `without_dropout`: what is learned compares the
    model with another one. All arguments must be the same in every process. Raises `Preempted` after a save when the process
    was asked to stop, `ArtifactError` if the model is random where it must not be.
    """
    device = join_processes(ctx)
    require_training_rows(data)
    steps = optimizer_steps(params, len(data))
    require_sound(ctx, params, steps, device)
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    identity = identity_of_run(ctx, params, steps, data)
    saved = find_start(ctx, params, identity, objective)
    formats = formats_to_publish(ctx, params.precision, params.published_dtype)
    note_generation(ctx)
    ctx.journal.note(in_passes(len(data), steps, batch))
    randomness = Randomness(ctx, device, without_dropout)
    made = make_engine(ctx, params, batch, make_model, device, randomness, steps)
    saved = load_start(ctx, params, identity, objective, made.engine, saved)
    if saved is not None:
        write_receipt(ctx, params, batch, len(data), steps, saved)
    training = Training(
        ctx=ctx,
        params=params,
        batch=batch,
        steps=steps,
        schedule=ScheduledData(data, ctx.seed, steps * batch.global_batch_size),
        collate=with_positions(collate),
        objective=objective,
        evaluate=evaluate,
        engine=made.engine,
        randomness=randomness,
        rates=made.rates,
        parameters=made.parameters,
        trained_parameters=made.trained,
        identity=identity,
        progress=TrainingProgress.of(saved),
        watching=Watching.of(params, saved.state if saved else None),
    )
    training.take_over(saved)
    trained = training.run()
    dtype = publish_trained(ctx, params, made, make_model, tokenizer, formats, stop_ids)
    return replace(trained, dtype=dtype)
