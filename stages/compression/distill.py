"""`distill`: a small causal model that learns from a large one's predictions on packed tokens, and from the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.formulas.bounds import Temperature
from stages.lib.models.architectures import architecture_problems, planned_architecture
from stages.lib.models.arithmetic import BYTES
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    import torch

    from stages.lib.formulas.token_losses import Tensors
    from stages.lib.training.evaluating import Evaluator, Metrics


class DistillParams(TrainingParams):
    """How the student is built and trained. One row is one block of `sequence_length` tokens of the pack stage."""

    architecture: dict[str, Any] | None = None
    """The student to begin with: `model_type` (llama, qwen3, gpt2, ...) and fields of its transformers config. Needed
    unless there is an input `student`. The vocabulary's size and special tokens are the tokenizer's."""
    temperature: Temperature = 1.0
    """What logits of teacher and student are divided by before they are compared, from 0.001 to 100: above 1, tokens that the teacher holds unlikely count for more."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teacher's predictions in the loss; the rest is that of the tokens themselves. 0: plain training, without the teacher."""
    isolate_documents: bool = True
    """Whether each document in a block is a world of its own, for student and teacher: attention and positions begin anew at its start, and the last token of one is not asked to predict the first of the next."""

    @model_validator(mode="after")
    def temperature_is_used(self) -> DistillParams:
        if self.alpha == 0 and self.temperature != 1:
            raise ValueError("temperature has no effect with alpha 0: remove it")
        return self


def run(ctx: Context, params: DistillParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.formulas.distillation_losses import measure_distillation
    from stages.lib.formulas.token_losses import TARGETS, logits_of
    from stages.lib.models.architectures import build, new_config
    from stages.lib.models.isolation import require_isolation
    from stages.lib.models.loading import DTYPES, count_parameters, initial_weights, load_model, require_vocabulary
    from stages.lib.processes.joining import join_processes
    from stages.lib.text.blocks import Blocks, collate_causal
    from stages.lib.text.chat_rendering import special_ids
    from stages.lib.text.packed import PackedTokens
    from stages.lib.text.tokenizers import (
        copy_tokenizer,
        load_tokenizer,
        require_same_tokenizer,
        tokenizer_facts,
        tokenizer_folder,
    )
    from stages.lib.training.evaluating import Evaluator
    from stages.lib.training.loop import train

    folder = ctx.inputs["tokens"]
    packed, heldout = PackedTokens(folder), PackedTokens(folder, "heldout")
    length = packed.sequence_length
    tokenizer = load_tokenizer(folder)
    require_same_tokenizer(ctx.inputs["teacher"], folder, "inputs.teacher")
    device = join_processes(ctx)

    source = ctx.inputs.get("student")
    if source is None:
        config = new_config(params.architecture or {}, tokenizer, length)
        source = initial_weights(ctx, lambda: build(AutoModelForCausalLM, config))
        if ctx.world.is_main:
            # Fails now, and not after training, if transformers opens another tokenizer beside this model's config.
            copy_tokenizer(folder, source)
    else:
        require_same_tokenizer(source, folder, "inputs.student")

    # Whole in every process, and before the training engine exists: from then on ZeRO-3 would split it too.
    teacher = load_model(AutoModelForCausalLM, ctx.inputs["teacher"])
    require_vocabulary(teacher, tokenizer)
    teacher.to(device, DTYPES[params.precision]).eval().requires_grad_(False)
    # With a cache transformers would not look for the documents' borders in the positions.
    teacher.config.use_cache = False
    teacher_parameters = count_parameters(teacher)

    collate = collate_causal(isolate=params.isolate_documents)
    plain_ids = sorted(set(range(len(tokenizer))) - special_ids(tokenizer))[:3]
    if params.isolate_documents:
        require_isolation(Evaluator(teacher, ctx, device, batch_size=1), collate, plain_ids, length)

    def measure(model: torch.nn.Module, batch: Tensors) -> Tensors:
        return measure_distillation(logits_of(model, batch), logits_of(teacher, batch), batch[TARGETS])

    def evaluate(evaluator: Evaluator) -> Metrics:
        if params.isolate_documents:
            require_isolation(evaluator, collate, plain_ids, length)
        return distillation_metrics(evaluator.sums(Blocks(heldout), collate, measure))

    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=tokenizer_folder(folder),
        data=Blocks(packed),
        collate=collate,
        objective=DistillationObjective(params, teacher),
        evaluate=evaluate,
    )
    start = "base" if "student" in ctx.inputs else "untrained"
    of_student = ("heldout_loss", "heldout_perplexity", "heldout_token_accuracy", "heldout_kl", "heldout_agreement")
    metrics = {
        **trained.after,
        **{f"{name}_{start}": trained.before[name] for name in of_student},
        "parameters_fraction": trained.parameters / teacher_parameters,
        "parameters_teacher": float(teacher_parameters),
        "train_loss": trained.train_loss,
        "trained_tokens": float(trained.steps * params.global_batch_size * length),
    }
    facts = Facts(
        **tokenizer_facts(ctx.out if ctx.world.is_main else folder),
        max_length_tokens=length,
        head_type="causal_lm",
        dtype=params.precision,
        parameters=trained.parameters,
        train_tokens=packed.num_tokens,
        heldout_tokens=heldout.num_tokens,
        train_rows=len(packed),
        heldout_rows=len(heldout),
        optimizer_steps=trained.steps,
    )
    return Result(metrics, facts)


class DistillationObjective:
    """`distillation_losses.distillation_losses`, the mean per token that is asked for."""

    def __init__(self, params: DistillParams, teacher: torch.nn.Module) -> None:
        self.params = params
        self.teacher = teacher

    def count(self, batch: Tensors) -> torch.Tensor:
        from stages.lib.formulas.token_losses import num_asked

        return num_asked(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        import torch

        from stages.lib.formulas.distillation_losses import distillation_loss_sum
        from stages.lib.formulas.token_losses import TARGETS, logits_of

        teacher_BTV = None
        if self.params.alpha > 0:
            with torch.no_grad():
                teacher_BTV = logits_of(self.teacher, batch)
        return distillation_loss_sum(
            logits_of(model, batch),
            teacher_BTV,
            batch[TARGETS],
            temperature=self.params.temperature,
            alpha=self.params.alpha,
        )


def distillation_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Of the student, and `..._teacher` of the teacher: nats per token, perplexity, accuracy; and how near they are.

    A loss beyond 700, whose exponential is no number, counts as 700.
    """
    means = {name: total / sums["tokens"] for name, total in sums.items()}
    perplexity, teachers = (math.exp(min(means[name], 700.0)) for name in ("nats", "nats_teacher"))
    return {
        "heldout_loss": means["nats"],
        "heldout_perplexity": perplexity,
        "heldout_token_accuracy": means["correct"],
        "heldout_loss_teacher": means["nats_teacher"],
        "heldout_perplexity_teacher": teachers,
        "heldout_token_accuracy_teacher": means["correct_teacher"],
        "heldout_perplexity_ratio": perplexity / teachers,
        "heldout_kl": means["kl"],
        "heldout_agreement": means["agreed"],
    }


def estimate(forecast: Forecast) -> Estimate:
    """The student's; in memory the teacher's weights and logits come on top."""
    params: DistillParams = forecast.params
    tokens, teacher, student = (forecast.inputs.get(role, Estimate()) for role in ("tokens", "teacher", "student"))
    length = tokens.sequence_length
    architecture = student.architecture
    if params.architecture is not None:
        architecture = planned_architecture(params.architecture, tokens.vocabulary_size)
    known = estimate_training(
        forecast,
        architecture=architecture,
        parameters=student.parameters,
        num_rows=tokens.train_tokens // length if tokens.train_tokens and length else None,
        sequence_length=length,
        vocabulary_size=tokens.vocabulary_size,
        train_tokens=tokens.train_tokens,
    )
    if None in (
        known.memory_bytes_per_rank,
        teacher.parameters,
        known.micro_batch_size,
        length,
        tokens.vocabulary_size,
    ):
        return known
    assert known.memory_bytes_per_rank and teacher.parameters and known.micro_batch_size and length
    logits = known.micro_batch_size * length * (tokens.vocabulary_size or 0)
    held = (teacher.parameters + logits) * BYTES[params.precision]
    return replace(known, memory_bytes_per_rank=known.memory_bytes_per_rank + held)


def check(forecast: Forecast) -> list[Problem]:
    params: DistillParams = forecast.params
    tokens = forecast.inputs.get("tokens", Estimate())
    problems = check_training(forecast)
    if (params.architecture is None) == ("student" not in forecast.inputs):
        both = params.architecture is not None
        problems.append(
            Problem(
                "params.architecture",
                "has no effect where the stage has an input student"
                if both
                else "is required where the stage has no input student",
                "Remove one of them." if both else "Give model_type and the sizes of the student.",
            )
        )
    if params.architecture is not None:
        problems += architecture_problems(params.architecture, tokens)
    for role in ("teacher", "student"):
        size = forecast.inputs.get(role, Estimate()).vocabulary_size
        if size and tokens.vocabulary_size and size != tokens.vocabulary_size:
            problems.append(
                Problem(
                    f"inputs.{role}",
                    f"has a vocabulary of {size}, and the tokens one of {tokens.vocabulary_size}",
                    "Teacher, student and tokens must be of the same tokenizer: pack with the teacher's.",
                )
            )
    return problems


STAGE = Stage(
    kind="distill",
    version=1,
    summary="a small causal model that learns a large one's predictions on packed tokens",
    params=DistillParams,
    inputs={
        "teacher": accepts(Kind.CAUSAL_LM),
        "tokens": accepts(Kind.TOKENS),
        "student": accepts(Kind.CAUSAL_LM, optional=True),
    },
    output=Kind.CAUSAL_LM,
    run=run,
    headline=(
        "heldout_perplexity",
        "heldout_perplexity_teacher",
        "heldout_perplexity_untrained",
        "heldout_perplexity_ratio",
        "parameters_fraction",
    ),
    distributed=True,
    estimate=estimate,
    check=check,
)
