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
from stages.lib.models.adapters.params import VirtualTokens
from stages.lib.models.architectures import (
    planned_architecture,
    starting_model,
    starting_problems,
    vocabulary_problems,
)
from stages.lib.models.families import mixing_problems
from stages.lib.models.memory import BYTES
from stages.lib.text.template_forecast import unembedded_problems
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams, causal_lm_or_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    def measures(self) -> tuple[str, ...]:
        return (*OF_STUDENT, "heldout_perplexity_ratio")

    @property
    def trains_causal_lm(self) -> bool:
        return True

    @model_validator(mode="after")
    def blocks_are_whole(self) -> DistillParams:
        if isinstance(self.adapter, VirtualTokens) and self.isolate_documents:
            raise ValueError(
                f"adapter: {self.adapter.method} puts its tokens before a whole block, not before each document in it: set "
                "isolate_documents: false, or take a method without virtual tokens"
            )
        return self

    @model_validator(mode="after")
    def temperature_is_used(self) -> DistillParams:
        if self.alpha == 0 and self.temperature != 1:
            raise ValueError("temperature has no effect with alpha 0: remove it")
        return self


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
    problems = check_training(forecast) + starting_problems(forecast.params.architecture, "student", forecast)
    for known in (forecast.params.architecture, *(each.architecture for each in forecast.inputs.values())):
        problems += mixing_problems(known or {}, forecast.params.isolate_documents)
    hint = "Teacher, student and tokens must be of the same tokenizer: pack with the teacher's."
    for role in ("teacher", "student"):
        problems += vocabulary_problems(forecast, role, "tokens", hint)
    return problems + unembedded_problems(forecast)


def run(ctx: Context, params: DistillParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.isolation import plain_ids, require_isolation
    from stages.lib.models.loading import count_parameters, load_model
    from stages.lib.processes.joining import join_processes
    from stages.lib.text.blocks import Blocks, collate_causal
    from stages.lib.text.packed import PackedTokens, facts_of_tokens
    from stages.lib.text.tokenizers import load_tokenizer, require_same_tokenizer, tokenizer_facts, tokenizer_folder
    from stages.lib.training.evaluating import Evaluator
    from stages.lib.training.loop import train

    folder = ctx.inputs["tokens"]
    packed, heldout = PackedTokens(folder), PackedTokens(folder, "heldout")
    length = packed.sequence_length
    tokenizer = load_tokenizer(folder)
    require_same_tokenizer(ctx.inputs["teacher"], folder, "inputs.teacher")
    device = join_processes(ctx)
    source, _ = starting_model(ctx, "student", params.architecture, AutoModelForCausalLM, length)
    teacher = load_teacher(ctx, params, tokenizer, device)
    teacher_parameters = count_parameters(teacher)

    collate = collate_causal(isolate=params.isolate_documents)
    objective = DistillationObjective(params, teacher)
    if params.isolate_documents:
        require_isolation(Evaluator(teacher, ctx, device, batch_size=1), collate, plain_ids(tokenizer), length)

    def evaluate(evaluator: Evaluator) -> Metrics:
        if params.isolate_documents:
            require_isolation(evaluator, collate, plain_ids(tokenizer), length)
        return distillation_metrics(evaluator.sums(Blocks(heldout), collate, objective.measure))

    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=tokenizer_folder(folder),
        data=Blocks(packed),
        collate=collate,
        objective=objective,
        evaluate=evaluate,
    )
    start = "base" if "student" in ctx.inputs else "untrained"
    metrics = {
        **trained.after,
        **{f"{name}_{start}": trained.before[name] for name in OF_STUDENT},
        "parameters_fraction": trained.parameters / teacher_parameters,
        "parameters_teacher": float(teacher_parameters),
        "train_loss": trained.train_loss,
        "trained_tokens": float(trained.steps * params.global_batch_size * length),
    }
    facts = Facts(
        **tokenizer_facts(ctx.out if ctx.world.is_main else folder),
        **facts_of_tokens(packed, heldout),
        head_type="causal_lm",
        dtype=trained.dtype,
        parameters=trained.parameters,
        optimizer_steps=trained.steps,
    )
    return Result(metrics, facts)


STAGE = Stage(
    kind="distill",
    version=2,
    summary="a small causal model that learns a large one's predictions on packed tokens",
    params=DistillParams,
    inputs={
        "teacher": accepts(Kind.CAUSAL_LM),
        "tokens": accepts(Kind.TOKENS),
        "student": accepts(Kind.CAUSAL_LM, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "extends": accepts(Kind.CAUSAL_LM, optional=True),
    },
    output=causal_lm_or_adapter,
    run=run,
    headline=(
        "heldout_perplexity",
        "heldout_perplexity_teacher",
        "heldout_perplexity_untrained",
        "heldout_perplexity_ratio",
        "parameters_fraction",
    ),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


OF_STUDENT = ("heldout_loss", "heldout_perplexity", "heldout_token_accuracy", "heldout_kl", "heldout_agreement")
"""The metrics that training changes; the others are the teacher's."""


def load_teacher(
    ctx: Context, params: DistillParams, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The teacher, whole in every process.

    It must come before the training engine exists: from then on ZeRO-3 would split it too.
    """
    from transformers import AutoModelForCausalLM

    from stages.lib.models.drawing import require_quiet
    from stages.lib.models.loading import DTYPES, load_model, require_vocabulary

    teacher = load_model(AutoModelForCausalLM, ctx.inputs["teacher"])
    require_vocabulary(teacher, tokenizer)
    teacher.to(device, DTYPES[params.precision]).eval().requires_grad_(False)
    # With a cache transformers would not look for the documents' borders in the positions.
    teacher.config.use_cache = False
    require_quiet(teacher, "inputs.teacher")
    return teacher


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

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """Sums over tokens: what student and teacher make of them, and how near they are."""
        from stages.lib.formulas.distillation_losses import measure_distillation
        from stages.lib.formulas.token_losses import TARGETS, logits_of

        return measure_distillation(logits_of(model, batch), logits_of(self.teacher, batch), batch[TARGETS])


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
