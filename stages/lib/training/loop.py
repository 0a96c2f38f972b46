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
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import DataError, Preempted, Problem, RecipeError
from pipeline.stage import Context
from pipeline.store.numbers import require_finite
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.formats import formats_to_publish
from stages.lib.models.generation import note_generation
from stages.lib.processes.collectives import all_reduce_sum, any_process, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.text.batches import Collate, num_tokens, with_positions
from stages.lib.training.adapted import publish_trained
from stages.lib.training.carrying import carried_by, go_on, one_step
from stages.lib.training.engine import Engine, Stepped
from stages.lib.training.evaluating import Evaluator, Metrics, StopRequested
from stages.lib.training.making import make_engine
from stages.lib.training.params import Batch, TrainingParams, derive_batch, learning_rate_factor, optimizer_steps
from stages.lib.training.randomness import Randomness
from stages.lib.training.scheduling import ScheduledData, fingerprint
from stages.lib.training.state import Saved, Window, find_measured, find_saved, save_checkpoint, write_receipt


class Objective(Protocol):
    """What is learned."""

    def count(self, batch: Tensors) -> torch.Tensor:
        """How many units (label tokens, pairs, examples) the micro batch's loss is summed over. A scalar."""

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The loss summed over those units, in float32. Must call `model(...)` exactly once: DDP counts on it."""


@dataclass(frozen=True)
class Trained:
    """What `train` returns in every process. The published model lies in `ctx.out`."""

    before: Metrics
    """What `evaluate` measured before the first step."""
    after: Metrics
    """What `evaluate` measured after the last step."""
    steps: int
    parameters: int
    train_loss: float
    """Mean training loss per unit over the steps that the last line of the journal covers."""
    dtype: str = "fp32"
    """The number format of the published weights, or of most of them."""


LOOKED_AT = 32
"""Rows among which two are chosen to call the model with before training."""


@dataclass
class TrainingProgress:
    """How far the run is, and what it carries from one step to the next. All of it is in a checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    window: Window = field(default_factory=Window)
    before: Metrics | None = None

    @classmethod
    def of(cls, saved: Saved | None) -> TrainingProgress:
        if saved is None:
            return cls()
        return cls(saved.state["step"], Window(**saved.state["window"]), saved.state["before"])


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
    tokens_since: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    def run(self) -> Trained:
        """Trains from where `progress` stands. Raises `Preempted` after a save when the process was asked to stop."""
        progress = self.progress
        self.look_at_model()
        try:
            if progress.step == 0:
                progress.before = self.heldout()
            elif self.evaluation_is_due():
                self.heldout()  # of a step whose measurement a stop cut short
            self.clock = time.monotonic()
            while progress.step < self.steps:
                self.take_step()
                self.finish_step()
            after = self.heldout()
        except StopRequested:
            raise Preempted(f"while measuring, at step {progress.step} of {self.steps}") from None
        assert progress.before is not None and progress.window.last_mean is not None
        return Trained(progress.before, after, self.steps, self.parameters, progress.window.last_mean)

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
        if units <= 0:
            raise DataError(
                Problem(
                    f"step {step + 1}",
                    "no row of the batch has anything to learn from (all labels are masked)",
                    "Take a larger global_batch_size or max_length_tokens, or look at the rows.",
                )
            )
        losses: list[torch.Tensor] = []
        with one_step(self.objective):
            for number, batch in enumerate(batches):
                with self.randomness.of(batch, step):
                    engine.backward(partial(self.loss, batch, units, losses), last=number == len(batches) - 1)
        (loss,) = all_reduce_sum([float(torch.stack(losses).sum())])
        self.require_finite_number("loss", loss / units)
        factor = learning_rate_factor(self.params, step, self.steps)
        stepped = engine.step([rate * factor for rate in self.rates])
        if not stepped.taken and self.params.precision != "fp16":
            self.require_finite_number("gradient norm", stepped.gradient_norm)
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
        inputs = {name: tensor.to(self.engine.device) for name, tensor in batch.items() if name != "positions"}
        return self.objective.loss_sum(self.engine.wrapped, inputs)

    def loss(self, batch: Tensors, units: float, losses: list[torch.Tensor]) -> torch.Tensor:
        """This micro batch's share of the step's loss, times the number of processes, which average gradients.

        Its sum, in double precision, is added to `losses`.
        """
        loss_sum = self.loss_sum(batch)
        losses.append(loss_sum.detach().double())
        return loss_sum / torch.tensor(units, dtype=loss_sum.dtype) * self.ctx.world.size

    def require_finite_number(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DataError(
                Problem(
                    f"step {self.progress.step + 1}",
                    f"the {what} is {value}",
                    "Lower the learning rate, lengthen the warmup, or look at the rows of this step.",
                )
            )

    def log(self, stepped: Stepped, learning_rate: float) -> None:
        """Writes a line of the journal when one is due."""
        ctx, step = self.ctx, self.progress.step
        if step % ctx.resources.log_every_steps and step != self.steps:
            return
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        tokens, self.tokens_since = self.tokens_since, 0.0
        ctx.journal.write(
            "step",
            step=step,
            total_steps=self.steps,
            loss=self.progress.window.close(),
            learning_rate=learning_rate,
            gradient_norm=stepped.gradient_norm if math.isfinite(stepped.gradient_norm) else None,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 3),
            **({} if stepped.taken else {"step_skipped": True}),
        )

    def finish_step(self) -> None:
        """Measures and saves where due, and stops where asked to."""
        ctx, step = self.ctx, self.progress.step
        stopping = any_process(ctx.stop_requested())
        if not stopping and step < self.steps and self.evaluation_is_due():
            try:
                self.heldout()
            except StopRequested:
                stopping = True  # measured after the restart
        if stopping or step == self.steps or step % ctx.resources.save_every_steps == 0:
            self.save()
        if stopping:
            raise Preempted(f"at step {step} of {self.steps}")

    def evaluation_is_due(self) -> bool:
        every, step = self.params.evaluate_every_steps, self.progress.step
        return every is not None and 0 < step < self.steps and step % every == 0

    def heldout(self) -> Metrics:
        """The stage's held-out metrics at this step, from the journal if they stand there. Raises `StopRequested`."""
        ctx, step = self.ctx, self.progress.step
        if measured := from_main(lambda: find_measured(ctx.journal, step)):
            return measured
        started = time.monotonic()
        evaluator = Evaluator(self.engine.wrapped, ctx, self.engine.device, self.batch.micro_batch_size)
        metrics = self.evaluate(evaluator)
        require_finite(metrics, f"step {step}", "Lower the learning rate.")
        ctx.journal.write("heldout", step=step, total_steps=self.steps, **metrics)
        self.clock += time.monotonic() - started
        return metrics

    def save(self) -> None:
        carried = {"window": asdict(self.progress.window), "before": self.progress.before}
        content = {**self.identity, **carried, **carried_by(self.objective)}
        save_checkpoint(self.ctx, self.engine, self.progress.step, self.steps, self.trained_parameters, content)


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
    if not len(data):
        raise DataError(Problem("training rows", "there are none", "Look at the ledger of the stage that made them."))
    steps = optimizer_steps(params, len(data))
    require_sound(params, steps, device)
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    identity = {"total_steps": steps, "global_batch_size": params.global_batch_size}
    identity |= {"seed": ctx.seed, "data": fingerprint(data)}
    saved = find_saved(ctx, identity)
    formats = formats_to_publish(ctx, params.precision, params.published_dtype)
    note_generation(ctx)
    ctx.journal.note(in_passes(len(data), steps, batch))
    randomness = Randomness(ctx, device, without_dropout)
    made = make_engine(ctx, params, batch, make_model, device, randomness)
    if saved is not None:
        made.engine.load(saved.folder)
        write_receipt(ctx, params, batch, len(data), steps, saved)
        go_on(objective, saved.state)
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
    )
    trained = training.run()
    dtype = publish_trained(ctx, params, made, make_model, tokenizer, formats, stop_ids)
    return replace(trained, dtype=dtype)


def in_passes(num_rows: int, steps: int, batch: Batch) -> str:
    """How often the training rows are seen, for the journal."""
    passes = steps * batch.global_batch_size / num_rows
    return f"{num_rows:,} rows, {steps:,} steps of {batch}: {passes:.2f} passes"


def require_sound(params: TrainingParams, steps: int, device: torch.device) -> None:
    """Raises `RecipeError` with what is wrong with params now that the number of rows and the device are known."""
    problems = []
    if params.warmup_steps >= steps:
        what = f"{params.warmup_steps} is not below the {steps} steps that there are"
        problems.append(Problem("params.warmup_steps", what, "Lower it."))
    if params.precision == "fp16" and device.type == "cpu":
        problems.append(Problem("params.precision", "is fp16, which no CPU trains in", "Take bf16 or fp32."))
    if problems:
        raise RecipeError(*problems)
