"""One training loop for every stage that trains: `train(ctx, params, ...)`.

The loop is `transformers.Trainer` with or without DeepSpeed. A stage says what to learn (`Objective`), from which rows,
and what to measure on held-out rows; here it is decided how that is spread over processes, logged, saved and resumed:

- Rows come in an order that is a function of (seed, position) alone, and position p always belongs to optimizer step
  p // global_batch_size. So neither the number of processes nor the micro batch nor a restart changes what a step sees.
- A step's loss is the sum over all its rows in all processes, divided by the number of units (tokens, pairs) in all of
  them: accumulation and data parallelism average nothing on the way.
- Dropout draws from a generator seeded anew for every micro batch from (seed, position).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.errors import DataError, Preempted, Problem, RecipeError
from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.loading import count_parameters
from stages.lib.models.publishing import publish
from stages.lib.processes.collectives import all_reduce_sum, any_process, barrier, from_main
from stages.lib.processes.joining import join_processes, use_threads
from stages.lib.text.batches import Collate, num_tokens, with_positions
from stages.lib.training.evaluating import Evaluator, Measure, Metrics, StopRequested
from stages.lib.training.layouts import read_layout
from stages.lib.training.params import TrainingParams, derive_batch, learning_rate_factor, optimizer_steps
from stages.lib.training.scheduling import ScheduledData, fingerprint, seed_of
from stages.lib.training.state import (
    Run,
    Window,
    check_checkpoint,
    checkpoint_bytes,
    find_measured,
    write_receipt,
    write_state,
)

__all__ = ["Collate", "Evaluator", "Measure", "Metrics", "Objective", "Tensors", "Trained", "train"]


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


class SlipwayTrainer(Trainer):
    """`Trainer` with our loss arithmetic, schedule and journal. Overrides public methods only."""

    def __init__(self, *, run: Run, objective: Objective, evaluate: Callable[[Evaluator], Metrics], **options: Any):
        super().__init__(**options)
        self.run = run
        self.objective = objective
        self.measure = evaluate
        # Or Trainer would divide our loss by the number of accumulated batches.
        self.model_accepts_loss_kwargs = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            params, steps = self.run.params, self.run.steps
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate_factor(params, step, steps)
            )
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Tensors], num_batches: int, device: torch.device
    ) -> tuple[list[Tensors], torch.Tensor]:
        """The micro batches of one optimizer step, and the number of units in those of all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        units = sum(float(self.objective.count(batch)) for batch in batches)
        units, tokens = all_reduce_sum([units, sum(num_tokens(batch) for batch in batches)])
        if units <= 0:
            raise DataError(
                Problem(
                    f"step {self.state.global_step + 1}",
                    "no row of the batch has anything to learn from (all labels are masked)",
                    "Take a larger global_batch_size or max_length_tokens, or look at the rows.",
                )
            )
        self.run.tokens_since += tokens
        self.step_units = units
        return batches, torch.tensor(units, dtype=torch.float64, device=device)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Tensors, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This process's share of the step's loss, times the number of processes, which average gradients."""
        positions = inputs.pop("positions")
        torch.manual_seed(seed_of(self.run.ctx.seed, int(positions[0])))
        loss_sum = self.objective.loss_sum(model, inputs)
        return loss_sum / num_items_in_batch.to(loss_sum.dtype) * self.run.ctx.world.size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called after every step: refuses a loss that is not finite, and writes the journal when a line is due."""
        if "loss" not in logs:
            return
        run, step = self.run, self.state.global_step
        norm = float(logs.get("grad_norm") or 0.0)
        if norm < 0:
            norm = math.nan  # DeepSpeed says -1 for what is not finite
        skipped = run.params.precision == "fp16" and self.accelerator.optimizer_step_was_skipped
        if not math.isfinite(logs["loss"]) or not (math.isfinite(norm) or run.params.precision == "fp16"):
            what = "loss" if not math.isfinite(logs["loss"]) else "gradient norm"
            raise DataError(
                Problem(
                    f"step {step}",
                    f"the {what} is {logs['loss'] if what == 'loss' else norm}",
                    "Lower the learning rate, lengthen the warmup, or look at the rows of this step.",
                )
            )
        run.window.add(logs["loss"], self.step_units)
        if step % run.ctx.resources.log_every_steps and step != run.steps:
            return
        now = time.monotonic()
        seconds, run.clock = now - run.clock, now
        tokens, run.tokens_since = run.tokens_since, 0.0
        run.ctx.journal.write(
            "step",
            step=step,
            total_steps=run.steps,
            loss=run.window.close(),
            learning_rate=logs["learning_rate"],
            gradient_norm=norm if math.isfinite(norm) else None,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 3),
            **({"step_skipped": True} if skipped else {}),
        )

    def evaluate(self, *arguments: Any, **options: Any) -> Metrics:
        """The stage's held-out metrics, written to the journal. Asked to stop, it saves and measures after the restart."""
        self.control.should_evaluate = False
        try:
            return self.heldout()
        except StopRequested:
            self.run.stopping = self.control.should_save = self.control.should_training_stop = True
            return {}

    def heldout(self) -> Metrics:
        """The stage's held-out metrics at this step, from the journal if they stand there. Raises `StopRequested`."""
        run = self.run
        if measured := from_main(lambda: find_measured(run.ctx.journal, self.state.global_step)):
            return measured
        started = time.monotonic()
        evaluator = Evaluator(self.model_wrapped, run.ctx, run.device, run.batch.micro_batch_size)
        metrics = self.measure(evaluator)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise DataError(
                Problem(f"step {self.state.global_step}", f"{bad[0]} is {metrics[bad[0]]}", "Lower the learning rate.")
            )
        run.ctx.journal.write("heldout", step=self.state.global_step, total_steps=run.steps, **metrics)
        run.clock += time.monotonic() - started
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint. DeepSpeed writes its own, so that gathering them once more would be waste."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)


class Flow(TrainerCallback):
    """When to log, evaluate, save and stop; and what makes a checkpoint complete."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trainer: SlipwayTrainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Measures the model before the first step, or makes up for a measurement that a stop cut short."""
        run, trainer = self.run, self.trainer
        assert trainer is not None
        use_threads(run.ctx.resources)
        step = state.global_step
        if step == 0:
            run.before = trainer.heldout()
        elif self.evaluation_is_due(step) and step < run.steps:
            trainer.heldout()
        run.clock = time.monotonic()
        return control

    def evaluation_is_due(self, step: int) -> bool:
        every = self.run.params.evaluate_every_steps
        return every is not None and step > 0 and step % every == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        run, step = self.run, state.global_step
        control.should_log = True
        control.should_evaluate = self.evaluation_is_due(step) and step < run.steps
        last = step >= run.steps
        control.should_save = last or step % run.ctx.resources.save_every_steps == 0
        if any_process(run.ctx.stop_requested()):
            run.stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if control.should_save:
            needed = checkpoint_bytes(run)
            from_main(lambda: run.ctx.checkpoints.require_room(needed))
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Every process has written its part once all are here: the main one adds ours, and the list of all files."""
        barrier()
        from_main(lambda: self.complete(state.global_step))
        return control

    def complete(self, step: int) -> None:
        run = self.run
        checkpoints = run.ctx.checkpoints
        write_state(run.ctx, step, {**run.identity(), **run.carried()})
        checkpoints.complete(step)
        checkpoints.rotate()
        run.ctx.journal.write("progress", what="checkpoint", step=step, done=step, total=run.steps)


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
) -> Trained:
    """Trains `make_model()` on `data` and publishes it, with `tokenizer` (or the one in that folder), to `ctx.out`.

    `make_model` is called once the memory layout is known, in every process: it loads from a folder (of an input, or
    from `models.initial_weights`), so that ZeRO-3 can split the weights while they are read. `evaluate` is called
    before the first step, after the last, and every `evaluate_every_steps`. All arguments must be the same in every
    process. Raises `Preempted` after a save when the process was asked to stop.
    """
    device = join_processes(ctx)
    if not len(data):
        raise DataError(Problem("training rows", "there are none", "Look at the ledger of the stage that made them."))
    steps = optimizer_steps(params, len(data))
    require_sound(params, steps, device)
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    run = Run(ctx, params, batch, steps, device, len(data), fingerprint(data))
    resumed = from_main(lambda: check_checkpoint(ctx, run.identity())) if ctx.resume is not None else None
    if resumed:
        run.before = resumed["before"]
        run.window = Window(**resumed["window"])
        ctx.journal.rewind(resumed["step"])
    ctx.journal.note(
        f"{len(data):,} rows, {steps:,} steps of {batch}: {steps * batch.global_batch_size / len(data):.2f} passes"
    )
    arguments = training_arguments(run)
    use_threads(ctx.resources)
    barrier()  # The main process has written what the others are about to load.
    model = make_model()
    run.parameters = count_parameters(model)
    flow = Flow(run)
    trainer = SlipwayTrainer(
        run=run,
        objective=objective,
        evaluate=evaluate,
        model=model,
        args=arguments,
        train_dataset=ScheduledData(data, ctx.seed, steps * batch.global_batch_size),
        data_collator=with_positions(collate),
        callbacks=[flow],
    )
    assert trainer.is_deepspeed_enabled == (ctx.resources.deepspeed is not None)
    flow.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if resumed:
        write_receipt(run, resumed)
    try:
        trainer.train(resume_from_checkpoint=None if ctx.resume is None else str(ctx.resume))
        if run.stopping:
            raise Preempted(f"at step {trainer.state.global_step} of {steps}")
        after = trainer.heldout()
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    except StopRequested:
        raise Preempted(f"while measuring, at step {trainer.state.global_step} of {steps}") from None
    finally:
        # Or a model that is read from now on would be split over the processes by ZeRO-3, too.
        unset_hf_deepspeed_config()
    from_main(lambda: publish(trainer.model, state, tokenizer, ctx.out, precision=params.precision, stop_ids=stop_ids))
    assert run.before is not None and run.window.last_mean is not None
    return Trained(run.before, after, steps, run.parameters, run.window.last_mean)


def require_sound(params: TrainingParams, steps: int, device: torch.device) -> None:
    """Raises `RecipeError` with what is wrong with params now that the number of rows and the device are known."""
    problems = []
    if params.warmup_steps >= steps:
        problems.append(
            Problem(
                "params.warmup_steps",
                f"{params.warmup_steps} is not below the {steps} steps that there are",
                "Lower it.",
            )
        )
    if params.precision == "fp16" and device.type == "cpu":
        problems.append(Problem("params.precision", "is fp16, which no CPU trains in", "Take bf16 or fp32."))
    if problems:
        raise RecipeError(*problems)


def training_arguments(run: Run) -> TrainingArguments:
    """The arguments of `Trainer`, everything that we decide ourselves switched off."""
    ctx, params = run.ctx, run.params
    return TrainingArguments(
        output_dir=str(ctx.checkpoints.folder),
        per_device_train_batch_size=run.batch.micro_batch_size,
        per_device_eval_batch_size=run.batch.micro_batch_size,
        gradient_accumulation_steps=run.batch.accumulation,
        max_steps=run.steps,
        learning_rate=params.learning_rate,
        weight_decay=params.weight_decay,
        adam_beta1=params.adam_beta1,
        adam_beta2=params.adam_beta2,
        adam_epsilon=params.adam_epsilon,
        max_grad_norm=params.max_gradient_norm,
        optim="adamw_torch",
        bf16=params.precision == "bf16",
        fp16=params.precision == "fp16",
        gradient_checkpointing=ctx.resources.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",
        dataloader_pin_memory=run.device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=None,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        seed=ctx.seed % 2**32,
        use_cpu=run.device.type == "cpu",
        ddp_backend=torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=False,
        deepspeed=None if ctx.resources.deepspeed is None else read_layout(ctx.resources.deepspeed),
        push_to_hub=False,
    )
