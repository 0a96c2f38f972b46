"""`dpo`: a causal model learns from pairs of answers without a reward model, by direct preference optimization or its like.

What is learned is how much likelier than under the reference the chosen answer becomes, and the rejected one less likely
(Rafailov et al., 2023). The reference's log-probabilities come from its artifact, are computed once, before training, and are
kept in a file. Losses without a reference compute none.

The reference is what training begins with: the input `model`, and where an adapter of it is continued, the model with that
adapter as it was. The input `reference` names another one; where it is the input `model`, that is the adapter switched off.
The input `reference_logprobs` has what a step of that name computed of it: then no reference is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.preferring.loss_params import PairLossParams, loss_problems
from stages.lib.preferring.params import (
    PolicyParams,
    beside_reference_pass,
    check_policy_training,
    estimate_preference_training,
)
from stages.lib.text.template_date import on_template_date
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.params import causal_lm_or_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.lib.preferring.opening import Preferences
    from stages.lib.preferring.pairs import Pairs


class DPOParams(PairLossParams, PolicyParams):
    """How the policy is trained."""


def estimate(forecast: Forecast) -> Estimate:
    """The training's; its memory is that of the reference's pass where this takes more, as it may under ZeRO-3."""
    known = estimate_preference_training(forecast, without_dropout=True)
    loads_it = forecast.params.needs_reference and "reference_logprobs" not in forecast.inputs
    return beside_reference_pass(forecast, known) if loads_it else known


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong before the step runs: also a reference that cannot be of the same tokenizer."""
    return [*check_policy_training(forecast), *loss_problems(forecast)]


@on_template_date
def run(ctx: Context, params: DPOParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.loading import load_model, without_dropout
    from stages.lib.preferring.objective import PreferenceObjective, compared_with_the_start, require_whole_groups
    from stages.lib.preferring.opening import open_preferences
    from stages.lib.preferring.pairs import collate_pairs
    from stages.lib.text.batches import padding_of
    from stages.lib.training.loop import train

    start = ctx.inputs["model"]
    require_whole_groups(ctx, params)
    preferences = open_preferences(ctx, params)
    train_pairs, heldout_pairs, baselines = preferences.train, preferences.heldout, None
    if params.needs_reference:
        train_pairs, heldout_pairs, baselines = beside_reference(ctx, params, preferences)
    objective = PreferenceObjective(params)
    collate = collate_pairs(padding_of(preferences.tokenizer))
    trained = train(
        ctx,
        params,
        make_model=lambda: without_dropout(load_model(AutoModelForCausalLM, start)),
        tokenizer=preferences.home,
        data=train_pairs,
        collate=collate,
        objective=objective,
        evaluate=lambda evaluator: objective.heldout_metrics(evaluator, heldout_pairs, collate),
        without_dropout=True,
    )
    metrics = {
        **trained.after,
        **(baselines or compared_with_the_start(trained.before, trained.after, heldout_pairs)),
        "heldout_loss_base": trained.before["heldout_loss"],
        "train_loss": trained.train_loss,
        **preferences.ledger.metrics(),
    }
    return Result(metrics, preferences.facts(params, trained, head_type="causal_lm"))


STAGE = Stage(
    kind="dpo",
    version=5,
    summary="direct preference optimization of a causal model on pairs of answers",
    params=DPOParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "preferences": accepts(Kind.PREFERENCES),
        "reference": accepts(Kind.CAUSAL_LM, optional=True),
        "reference_logprobs": accepts(Kind.REFERENCE_LOGPROBS, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "extends": accepts(Kind.CAUSAL_LM, optional=True),
    },
    output=causal_lm_or_adapter,
    run=run,
    headline=("heldout_accuracy", "heldout_accuracy_base", "heldout_margin", "heldout_loss"),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


def beside_reference(
    ctx: Context, params: DPOParams, preferences: Preferences[Pairs]
) -> tuple[Pairs, Pairs, dict[str, float]]:
    """Training and held-out pairs with their log-probabilities under the reference, and how good that is by itself.

    It runs before the training engine exists: from then on ZeRO-3 would split the reference too.
    """
    from stages.lib.preferring.reference import publish_logprobs
    from stages.lib.preferring.reference_artifact import ReferenceQuestion, ask_reference

    question = ReferenceQuestion(
        data={"train": preferences.train, "heldout": preferences.heldout},
        tokenizer=preferences.tokenizer,
        home=preferences.home,
        max_length_tokens=params.max_length_tokens,
        precision=params.precision,
        tail_weight=params.tail_weight,
    )
    logprobs = ask_reference(ctx, question)
    train_logprobs_N2, heldout_logprobs_N2 = logprobs["train"], logprobs["heldout"]
    publish_logprobs(ctx, train=train_logprobs_N2, heldout=heldout_logprobs_N2)
    heldout_pairs = preferences.heldout.with_reference(heldout_logprobs_N2)
    found = baselines(heldout_logprobs_N2, heldout_pairs.answer_lengths())
    return preferences.train.with_reference(train_logprobs_N2), heldout_pairs, found


def baselines(reference_N2: NDArray[np.float64], answer_tokens_N2: NDArray[np.int64]) -> dict[str, float]:
    """How often the reference itself gives the chosen answer the higher probability, and how often that is the longer one.

    A sum of log-probabilities is the lower the longer an answer is; so it is told per token too.
    """
    import torch

    from stages.lib.formulas.calibration import wins
    from stages.lib.preferring.answers import accuracy_of_length

    per_token_N2 = reference_N2 / answer_tokens_N2
    return {
        "heldout_accuracy_base": float(wins(*torch.from_numpy(reference_N2).unbind(1)).mean()),
        "heldout_accuracy_base_per_token": float(wins(*torch.from_numpy(per_token_N2).unbind(1)).mean()),
        "heldout_accuracy_longer": accuracy_of_length(answer_tokens_N2),
    }
