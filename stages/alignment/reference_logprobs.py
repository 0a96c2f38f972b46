"""`reference_logprobs`: what a model says of every answer of a data set of preferences, computed once for all trainings on it.

`dpo` and `kto` take it as their input of that name: then they load no reference, and a sweep over beta or losses asks it once.
What is computed is what they would compute themselves, in the same batches: with the same micro_batch_size, device and
threads bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.adapters.folders import adapter_folder, unreadable_adapter
from stages.lib.models.lengths import length_problems
from stages.lib.models.memory import BYTES
from stages.lib.models.noise import noise_problems
from stages.lib.preferring.unpaired_params import input_problems
from stages.lib.text.template_date import TemplateDateParams, on_template_date
from stages.lib.text.template_forecast import untaught_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.preferring.reference import AnsweredRows
    from stages.lib.rows.ledger import Ledger


class MismatchedParams(Strict):
    """The steps of the kto that will compare with mismatched answers."""

    global_batch_size: int = Field(ge=2)
    """That of the kto."""
    max_steps: int | None = Field(default=None, ge=1)
    """That of the kto. Give either this or `epochs`."""
    epochs: float | None = Field(default=None, ge=1e-6, le=1e6)
    """That of the kto. Give either this or `max_steps`."""

    @model_validator(mode="after")
    def one_length(self) -> MismatchedParams:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either max_steps or epochs, and not both")
        return self


class ReferenceLogprobsParams(TemplateDateParams):
    """How the model is asked: as the trainings will that take the answer."""

    max_length_tokens: int = Field(ge=8)
    """Tokens per answer with its prompt: that of the trainings."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the rows than this cannot be used."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass: that of the trainings."""
    tail_weight: float | None = Field(default=None, ge=0, lt=1)
    """What tokens beyond the shorter answer's length count, for dpo with that param. null: as much as the others."""
    take_apart: bool = False
    """Of the input preferences: both answers of each pair by themselves, as kto takes them, and not as pairs for dpo."""
    mismatched: MismatchedParams | None = None
    """For kto with the loss kto: the answers after other prompts that it compares with in its steps. null: none."""


def estimate(forecast: Forecast) -> Estimate:
    """The weights in memory: each process holds the whole model."""
    params: ReferenceLogprobsParams = forecast.params
    parameters = forecast.inputs.get("model", Estimate()).parameters
    if parameters is None:
        return Estimate()
    width = BYTES[params.precision] if forecast.resources.deepspeed else BYTES["fp32"]
    return Estimate(memory_bytes_per_rank=parameters * width)


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong with inputs, length and options, found before the step runs."""
    params: ReferenceLogprobsParams = forecast.params
    problems = input_problems(forecast)
    single = params.take_apart or "unpaired_preferences" in forecast.inputs
    if params.take_apart and "preferences" not in forecast.inputs:
        problems.append(Problem("params.take_apart", "is for pairs, and there are none", "Remove it."))
    if params.mismatched is not None and not single:
        hint = "Add take_apart: true, or remove it."
        problems.append(Problem("params.mismatched", "is for single answers, and these are pairs", hint))
    if params.tail_weight is not None and single:
        problems.append(
            Problem("params.tail_weight", "compares the answers of a pair, and these are single", "Remove it.")
        )
    if (adapter := forecast.inputs.get("adapter", Estimate()).folder) is not None:
        problems += unreadable_adapter(adapter)
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    problems += length_problems(architecture, params.max_length_tokens) + noise_problems(architecture)
    return problems + untaught_problems(forecast)


@on_template_date
def run(ctx: Context, params: ReferenceLogprobsParams) -> Result:
    from stages.lib.models.adapters.saving import require_base
    from stages.lib.preferring.opening import tokenizer_of_policy
    from stages.lib.preferring.reference import identity_of
    from stages.lib.preferring.reference_artifact import ReferenceQuestion, pass_over, write_logprobs
    from stages.lib.processes.collectives import from_main
    from stages.lib.text.tokenizers import facts_of_tokenizer

    model, adapter = ctx.inputs["model"], ctx.inputs.get("adapter")
    if adapter is not None and (said := require_base(adapter_folder(adapter), model, ctx.origin("model")[0])):
        ctx.journal.note(said)
    tokenizer, home = tokenizer_of_policy(ctx, params.max_length_tokens)
    single = params.take_apart or "unpaired_preferences" in ctx.inputs
    data, ledger = (open_single if single else open_paired)(ctx, params, tokenizer)
    question = ReferenceQuestion(
        data=data,
        tokenizer=tokenizer,
        home=home,
        max_length_tokens=params.max_length_tokens,
        precision=params.precision,
        tail_weight=params.tail_weight,
        what="answers" if single else "pairs",
    )
    logprobs = pass_over(ctx, question, model, adapter)
    from_main(lambda: write_logprobs(ctx.out, question.made_of(ctx, identity_of(model, adapter)), logprobs))
    facts = Facts(
        **facts_of_tokenizer(tokenizer),
        max_length_tokens=params.max_length_tokens,
        train_rows=len(data["train"]),
        heldout_rows=len(data["heldout"]),
        dropped_rows=dict(ledger.dropped),
    )
    means = {f"{name}_logprob": float(found.mean()) for name, found in logprobs.items()}
    return Result({**means, **ledger.metrics()}, facts)


STAGE = Stage(
    kind="reference_logprobs",
    version=1,
    summary="log-probabilities of all answers of preferences under a reference, for dpo and kto to take in its place",
    params=ReferenceLogprobsParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "preferences": accepts(Kind.PREFERENCES, optional=True),
        "unpaired_preferences": accepts(Kind.UNPAIRED_PREFERENCES, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
    },
    output=Kind.REFERENCE_LOGPROBS,
    run=run,
    headline=("train_logprob", "heldout_logprob", "rows_kept"),
    distributed=True,
    estimate=estimate,
    check=check,
)


def open_paired(
    ctx: Context, params: ReferenceLogprobsParams, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, AnsweredRows], Ledger]:
    """Training and held-out pairs, as dpo reads them."""
    from stages.lib.preferring.pairs import open_pairs

    train, heldout, ledger = open_pairs(ctx, tokenizer, params.max_length_tokens, params.max_dropped_fraction)
    return {"train": train, "heldout": heldout}, ledger


def open_single(
    ctx: Context, params: ReferenceLogprobsParams, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, AnsweredRows], Ledger]:
    """Training and held-out answers, as kto reads them, and the mismatched ones of its steps if asked for."""
    from stages.lib.preferring.unpaired import (
        SPLITS,
        Unpaired,
        mismatched_among,
        mismatched_in_steps,
        tokenizing_answers,
    )
    from stages.lib.preferring.unpaired_params import ROLES
    from stages.lib.text.tokenized_parts import tokenize_input
    from stages.lib.training.params import optimizer_steps

    role, longest = next(role for role in ROLES if role in ctx.inputs), params.max_length_tokens
    how = tokenizing_answers(tokenizer, longest)
    tokenized = tokenize_input(ctx, role, how, params.max_dropped_fraction)
    train, heldout = (Unpaired(each) for each in tokenized[:2])
    asked: list[AnsweredRows] = [train, heldout]
    if (steps := params.mismatched) is not None:
        count = optimizer_steps(steps, len(train))
        asked.append(mismatched_in_steps(train, ctx.seed, count, steps.global_batch_size, longest))
        asked.append(mismatched_among(heldout, longest))
    return dict(zip(SPLITS, asked, strict=False)), tokenized[2]
