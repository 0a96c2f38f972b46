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

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
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

from pipeline.errors import ArtifactError, DataError, LaunchError, Preempted, Problem
from pipeline.stage import Context
from stages.lib.distributed import all_reduce_sum, any_process, barrier, from_main, join_processes, use_threads
from stages.lib.models import count_parameters, publish
from stages.lib.training_params import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    Batch,
    TrainingParams,
    derive_batch,
    learning_rate_factor,
    optimizer_steps,
    read_layout,
    zero_stage,
)

Tensors = dict[str, torch.Tensor]
Metrics = dict[str, float]

STATE = "slipway.json"
"""What we need of a checkpoint beyond what Trainer and DeepSpeed write."""


class Objective(Protocol):
    """What is learned."""

    def count(self, batch: Tensors) -> torch.Tensor:
        """How many units (label tokens, pairs, examples) the micro batch's loss is summed over. A scalar."""

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The loss summed over those units, in float32. Must call `model(...)` exactly once: DDP counts on it."""


Collate = Callable[[list[dict[str, Any]]], Tensors]
"""Rows -> tensors. Each row carries its `position` in the schedule (in evaluation: its index), for randomness that
must be a function of (seed, position). Must not draw from a global random generator."""

Measure = Callable[[torch.nn.Module, Tensors], Mapping[str, torch.Tensor]]
"""One forward pass on held-out rows -> named sums over the batch."""


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


class StopRequested(Exception):
    """Ends an evaluation early, in all processes at once."""


class Evaluator:
    """Sums measures over held-out rows, spread over the processes. Works within the DeepSpeed engine."""

    def __init__(self, model: torch.nn.Module, ctx: Context, device: torch.device, batch_size: int) -> None:
        self.model = model
        self.ctx = ctx
        self.device = device
        self.batch_size = batch_size

    def sums(
        self, rows: Sequence[dict[str, Any]], collate: Collate, measure: Measure, batch_size: int | None = None
    ) -> Metrics:
        """Each of `measure`'s values summed over all `rows`, the same number in every process.

        All processes run the same number of forward passes, because ZeRO-3 gathers weights together: one that has no
        batch left repeats the first, and does not count it.
        """
        if not len(rows):
            raise DataError(
                Problem("held-out rows", "there are none to measure on", "Keep some back in the mix stage.")
            )
        size = batch_size or self.batch_size
        batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        world = self.ctx.world
        totals: dict[str, float] = {}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(batches), world.size):
                    if any_process(self.ctx.stop_requested()):
                        raise StopRequested
                    mine = first + world.rank
                    indices = batches[mine] if mine < len(batches) else batches[0]
                    batch = collate([{**rows[index], "position": index} for index in indices])
                    batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                    weight = 1.0 if mine < len(batches) else 0.0
                    for name, value in measure(self.model, batch).items():
                        # Not added when the weight is 0: a repeated batch counts for nothing, whatever its value.
                        totals[name] = totals.get(name, 0.0) + (float(value.double()) if weight else 0.0)
        finally:
            self.model.train(training)
        names = sorted(totals)
        return dict(zip(names, all_reduce_sum([totals[name] for name in names]), strict=True))

    def forward(self, compute: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
        """`compute(model)` in evaluation mode and without gradients, the same in every process."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return compute(self.model)
        finally:
            self.model.train(training)


class ScheduledData(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows in training order: position p is row `permutation(seed, p // N)[p % N]`, and nothing else decides."""

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int, length: int) -> None:
        self.rows = rows
        self.seed = seed
        self.length = length
        self.permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < self.length:
            raise IndexError(position)
        return {**self.rows[self.index(position)], "position": position}

    def index(self, position: int) -> int:
        """Which row stands at `position`."""
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self.permutations:
            # At most two are kept: a batch may reach over the end of a pass.
            self.permutations = {e: p for e, p in self.permutations.items() if e >= epoch - 1}
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.permutations[epoch] = generator.permutation(len(self.rows))
        return int(self.permutations[epoch][place])


def fingerprint(rows: Sequence[dict[str, Any]], samples: int = 64) -> str:
    """A digest of the number of rows and of the content of `samples` of them, evenly spread."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in sorted({int(i) for i in np.linspace(0, len(rows) - 1, min(samples, len(rows)))}):
        for name, value in sorted(rows[index].items()):
            digest.update(name.encode())
            digest.update(value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
    return digest.hexdigest()


@dataclass
class Window:
    """Training loss since the last line of the journal."""

    loss_sum: float = 0.0
    units: float = 0.0
    last_mean: float = math.nan

    def add(self, loss: float, units: float) -> None:
        self.loss_sum += loss * units
        self.units += units

    def close(self) -> float:
        """The mean loss per unit; the next window starts empty."""
        self.last_mean = self.loss_sum / self.units
        self.loss_sum = self.units = 0.0
        return self.last_mean


@dataclass
class Run:
    """What stays the same during one call of `train`, and what it keeps count of."""

    ctx: Context
    params: TrainingParams
    batch: Batch
    steps: int
    device: torch.device
    num_rows: int
    data_fingerprint: str
    zero_stage: int
    parameters: int = 0
    window: Window = field(default_factory=Window)
    before: Metrics | None = None
    stopping: bool = False
    tokens_since: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it."""
        return {
            "total_steps": self.steps,
            "global_batch_size": self.batch.global_batch_size,
            "seed": self.ctx.seed,
            "data": self.data_fingerprint,
        }


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
        """The stage's held-out metrics at this step. Raises `StopRequested`."""
        run = self.run
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
        due = self.evaluation_is_due(step) and step < run.steps
        measured = from_main(
            lambda: next((event for event in run.ctx.journal.events("heldout") if event.get("step") == step), None)
        )
        if step == 0 and run.before is None:
            run.before = metrics_of(measured) if measured else trainer.heldout()
        elif due and not measured:
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
        content = {
            "step": step,
            **run.identity(),
            "world_size": run.ctx.world.size,
            "zero_stage": run.zero_stage,
            "window": asdict(run.window),
            "before": run.before,
        }
        (checkpoints.path(step) / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
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
    batch = derive_batch(params.global_batch_size, ctx.resources, processes=ctx.world.size)
    run = Run(ctx, params, batch, steps, device, len(data), fingerprint(data), zero_stage(ctx.resources))
    resumed = from_main(lambda: check_checkpoint(run)) if ctx.resume is not None else None
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
    flow.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if resumed:
        write_receipt(run, resumed)
    try:
        trainer.train(resume_from_checkpoint=None if ctx.resume is None else str(ctx.resume))
        if run.stopping:
            raise Preempted(f"at step {trainer.state.global_step} of {steps}")
        after = trainer.heldout()
    except StopRequested:
        raise Preempted(f"while measuring, at step {trainer.state.global_step} of {steps}") from None
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    from_main(lambda: publish(trainer.model, state, tokenizer, ctx.out, precision=params.precision, stop_ids=stop_ids))
    # Or a model that is read from now on would still be split over the processes by ZeRO-3.
    unset_hf_deepspeed_config()
    assert run.before is not None
    return Trained(run.before, after, steps, run.parameters, run.window.last_mean)


def check_checkpoint(run: Run) -> dict[str, Any]:
    """Our part of the checkpoint that is resumed from.

    Raises `ArtifactError` if it belongs to another run, `LaunchError` if it was written by processes or in a memory layout
    that DeepSpeed cannot turn into the present ones.
    """
    path = Path(str(run.ctx.resume)) / STATE
    try:
        saved: dict[str, Any] = json.loads(path.read_bytes())
        differs = [name for name, value in run.identity().items() if saved[name] != value]
        processes, stage = saved["world_size"], saved["zero_stage"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(Problem(str(path), f"cannot be read: {error!r}", start_over(run))) from None
    if differs:
        name = differs[0]
        raise ArtifactError(
            Problem(
                str(run.ctx.resume),
                f"belongs to another run: its {name} is {saved[name]}, the recipe's is {run.identity()[name]}",
                start_over(run),
            )
        )
    if stage != run.zero_stage:
        raise LaunchError(
            Problem(
                "resources.deepspeed",
                f"the checkpoint {run.ctx.resume} was written {layout_words(stage)}, this run is {layout_words(run.zero_stage)}",
                f"Run {layout_words(stage)} again. {start_over(run)}",
            )
        )
    if stage and processes != run.ctx.world.size:
        raise LaunchError(
            Problem(
                "resources.processes",
                f"the checkpoint {run.ctx.resume} was written by {processes} processes, this run has {run.ctx.world.size}",
                f"DeepSpeed needs the same number: run with `--set` so that processes x nodes is {processes}. {start_over(run)}",
            )
        )
    return saved


def start_over(run: Run) -> str:
    return f"To start over, remove {run.ctx.checkpoints.folder}."


def layout_words(stage: int) -> str:
    return f"under ZeRO-{stage}" if stage else "without DeepSpeed"


def write_receipt(run: Run, saved: Mapping[str, Any]) -> None:
    """Says what was restored."""
    step, processes = saved["step"], saved["world_size"]
    position = step * run.batch.global_batch_size
    epoch, row = divmod(position, run.num_rows)
    run.ctx.journal.write(
        "resume",
        step=step,
        total_steps=run.steps,
        checkpoint=str(run.ctx.resume),
        restored=["weights", "optimizer", "schedule", "random generators", "data position", "loss window"],
        processes=processes,
        data_position=position,
        learning_rate=run.params.learning_rate * learning_rate_factor(run.params, step, run.steps),
    )
    run.ctx.journal.note(
        f"resumed at step {step} of {run.steps}: weights, optimizer, schedule, generators of {processes} processes;"
        f" next is row {row:,} of {run.num_rows:,} in pass {epoch + 1}"
    )


def checkpoint_bytes(run: Run) -> int:
    """What a checkpoint takes on the disk, at most."""
    return run.parameters * CHECKPOINT_BYTES_PER_PARAMETER + 2**20


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


def with_positions(collate: Collate) -> Collate:
    """`collate`, and the rows' positions beside what it returns."""

    def collate_with_positions(rows: list[dict[str, Any]]) -> Tensors:
        return {**collate(rows), "positions": torch.tensor([row["position"] for row in rows])}

    return collate_with_positions


def num_tokens(batch: Tensors) -> float:
    """Tokens of a micro batch, without padding where a 2-dimensional attention mask tells."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return float(mask.sum())
    return float(batch["input_ids"].numel()) if "input_ids" in batch else 0.0


def seed_of(*parts: int) -> int:
    """A seed of 63 bits that depends on every part."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def metrics_of(event: Mapping[str, Any]) -> Metrics:
    """The metrics in a `heldout` event."""
    return {name: value for name, value in event.items() if name not in ("event", "time", "step", "total_steps")}
