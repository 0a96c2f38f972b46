"""`kto`: a causal model learns from single answers that are desirable or not, each to a prompt of its own.

Desirable answers are to gain more over the reference than answers do to prompts that are not theirs, undesirable ones less
(Ethayarajh et al., 2024). Pairs are taken apart. The reference's log-probabilities come from its artifact, are computed
once, before training, and are kept in a file: those of the answers, and of the mismatched ones of every step. Or a step
`reference_logprobs` has computed them, and no reference is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.preferring.params import beside_reference_pass, check_policy_training, estimate_preference_training
from stages.lib.preferring.unpaired_params import UnpairedParams, input_problems, num_answers
from stages.lib.text.template_date import on_template_date
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.params import causal_lm_or_adapter

if TYPE_CHECKING:
    from stages.lib.preferring.opening import Preferences
    from stages.lib.preferring.unpaired import Mismatched, Unpaired


class KTOParams(UnpairedParams):
    """How the policy is trained."""


def estimate(forecast: Forecast) -> Estimate:
    """The training's; its memory is that of the reference's pass where this takes more, as it may under ZeRO-3."""
    rows = num_answers(forecast)
    known = estimate_preference_training(forecast, num_rows=rows, sequences=1, without_dropout=True)
    return known if "reference_logprobs" in forecast.inputs else beside_reference_pass(forecast, known)


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong before the step runs."""
    return [*input_problems(forecast), *check_policy_training(forecast)]


@on_template_date
def run(ctx: Context, params: KTOParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.loading import load_model, without_dropout
    from stages.lib.preferring.unpaired import collate_unpaired, open_unpaired
    from stages.lib.preferring.unpaired_objective import UnpairedObjective, told_balance, unpaired_baselines
    from stages.lib.text.batches import padding_of
    from stages.lib.training.loop import train

    start = ctx.inputs["model"]
    preferences = open_unpaired(ctx, params)
    ctx.journal.note(told_balance(params, preferences.train.desirable_N))
    answers = beside_reference(ctx, params, preferences)
    objective = UnpairedObjective(params)
    padding_id = padding_of(preferences.tokenizer)
    collate_heldout = collate_unpaired(padding_id, answers.mismatched_heldout)
    trained = train(
        ctx,
        params,
        make_model=lambda: without_dropout(load_model(AutoModelForCausalLM, start)),
        tokenizer=preferences.home,
        data=answers.train,
        collate=collate_unpaired(padding_id, answers.mismatched_train),
        objective=objective,
        evaluate=lambda evaluator: objective.heldout_metrics(evaluator, answers.heldout, collate_heldout),
        without_dropout=True,
    )
    assert answers.heldout.reference_N is not None
    metrics = {
        **trained.after,
        **unpaired_baselines(answers.heldout, answers.heldout.reference_N),
        "heldout_loss_base": trained.before["heldout_loss"],
        "train_loss": trained.train_loss,
        **preferences.ledger.metrics(),
    }
    return Result(metrics, preferences.facts(params, trained, head_type="causal_lm"))


STAGE = Stage(
    kind="kto",
    version=1,
    summary="alignment of a causal model on single answers that are desirable or not",
    params=KTOParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "unpaired_preferences": accepts(Kind.UNPAIRED_PREFERENCES, optional=True),
        "preferences": accepts(Kind.PREFERENCES, optional=True),
        "reference": accepts(Kind.CAUSAL_LM, optional=True),
        "reference_logprobs": accepts(Kind.REFERENCE_LOGPROBS, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "extends": accepts(Kind.CAUSAL_LM, optional=True),
    },
    output=causal_lm_or_adapter,
    run=run,
    headline=("heldout_auc", "heldout_auc_base", "heldout_margin", "heldout_loss"),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


@dataclass(frozen=True)
class Compared:
    """Training and held-out answers beside their log-probabilities under the reference; mismatched ones if the loss asks."""

    train: Unpaired
    heldout: Unpaired
    mismatched_train: Mismatched | None
    mismatched_heldout: Mismatched | None


def beside_reference(ctx: Context, params: KTOParams, preferences: Preferences[Unpaired]) -> Compared:
    """All that is asked of the reference, before the training engine exists: from then on ZeRO-3 would split it too."""
    from stages.lib.preferring.reference import publish_logprobs
    from stages.lib.preferring.reference_artifact import ReferenceQuestion, ask_reference
    from stages.lib.preferring.unpaired import SPLITS, mismatched_among, mismatched_in_steps
    from stages.lib.training.params import optimizer_steps

    rows, heldout, longest = preferences.train, preferences.heldout, params.max_length_tokens
    others: list[Mismatched] = []
    if params.unpaired_loss.needs_kl:
        steps = optimizer_steps(params, len(rows))
        in_steps = mismatched_in_steps(rows, ctx.seed, steps, params.global_batch_size, longest)
        others = [in_steps, mismatched_among(heldout, longest)]
        ctx.journal.note(told_mismatched(*others))
    question = ReferenceQuestion(
        data=dict(zip(SPLITS, (rows, heldout, *others), strict=False)),
        tokenizer=preferences.tokenizer,
        home=preferences.home,
        max_length_tokens=longest,
        precision=params.precision,
        what="answers",
    )
    found = {name: each[:, 0] for name, each in ask_reference(ctx, question).items()}
    publish_logprobs(ctx, **found)
    logprobs = list(found.values())
    beside = [each.with_reference(found) for each, found in zip(others, logprobs[2:], strict=True)]
    mismatched_train, mismatched_heldout = beside or (None, None)
    return Compared(
        rows.with_reference(logprobs[0]), heldout.with_reference(logprobs[1]), mismatched_train, mismatched_heldout
    )


def told_mismatched(train: Mismatched, heldout: Mismatched) -> str:
    """What the estimate of the divergence is made of, for the journal."""
    said = f"mismatched answers: {len(train):,} of training, one for each place of each step, and {len(heldout):,} held-out"
    if cut := train.num_cut + heldout.num_cut:
        said += f"; {cut:,} of them lose their end, because they are longer than max_length_tokens after another prompt"
    if matched := train.num_matched + heldout.num_matched:
        said += f"; {matched:,} answer their own prompt after all, for want of another one in their step"
    return said
