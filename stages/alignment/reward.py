"""`reward`: a reward model, trained so that the chosen answer of each pair scores higher than the rejected one.

`preferences` is one mixed data set. Several sets are sources of its mix, in the shares that the mix gives them; held-out
accuracy is then told for each of them, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import Weight
from stages.lib.models.arithmetic import completed, field_of
from stages.lib.models.families import scoring_problems
from stages.lib.preferring.params import PreferenceParams, check_preference_training, estimate_preference_training
from stages.lib.text.template_date import on_template_date
from stages.lib.training.extension import EXTENSION_PARAMS

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from stages.lib.formulas.token_losses import Tensors
    from stages.lib.preferring.pairs import Pairs
    from stages.lib.text.batches import Collate
    from stages.lib.training.evaluating import Evaluator


class RewardParams(PreferenceParams):
    """How the reward model is trained."""

    margin: Weight = 0.0
    """By how much the chosen answer's score should exceed the rejected one's before the loss counts the pair as even. Only with margin_from: constant."""
    margin_from: Literal["constant", "column"] = "constant"
    """Where margins come from. constant: every pair has `margin`; column: each row of the preferences says its own as `margin`, a number of at least 0, and one that says none is an error."""
    label_smoothing: Weight = Field(default=0.0, lt=0.5)
    """The share of pairs that are taken to be labelled the wrong way round: it keeps scores from drifting apart on pairs that are always told apart."""
    center_rewards_coefficient: Weight = 0.0
    """Weight of the squared sum of a pair's two scores in the loss, which holds scores around 0 (0.01 is usual). Without it only differences of scores mean something."""

    def measures(self) -> tuple[str, ...]:
        names = ("accuracy", "accuracy_of_*", "loss", "margin", "calibration_error", "score", "score_*")
        return tuple(f"heldout_{name}" for name in names)

    @model_validator(mode="after")
    def margin_is_used(self) -> RewardParams:
        if self.margin and self.margin_from == "column":
            raise ValueError("margin has no effect with margin_from: column: remove it, or take constant")
        return self


def estimate(forecast: Forecast) -> Estimate:
    """The causal model's, with a head of one output in place of the one over the vocabulary."""
    known = estimate_preference_training(forecast)
    architecture = known.architecture or {}
    hidden, vocabulary = field_of(architecture, "hidden_size"), field_of(architecture, "vocab_size")
    if known.parameters is None or hidden is None or vocabulary is None:
        return known
    language_head = 0 if (completed(architecture) or architecture).get("tie_word_embeddings") else hidden * vocabulary
    trained = None if known.trained_parameters is None else known.trained_parameters + hidden
    return replace(known, parameters=known.parameters - language_head + hidden, trained_parameters=trained)


def check(forecast: Forecast) -> list[Problem]:
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    return [*check_preference_training(forecast), *scoring_problems(architecture)]


@on_template_date
def run(ctx: Context, params: RewardParams) -> Result:
    from transformers import AutoModelForSequenceClassification

    from stages.lib.models.heads import add_reward_head, choose_padding
    from stages.lib.models.loading import initial_weights, load_model
    from stages.lib.preferring.answers import accuracy_of_length
    from stages.lib.preferring.opening import open_preferences
    from stages.lib.preferring.pairs import collate_pairs
    from stages.lib.preferring.reward_models import HEAD_TYPE, require_fixed_prompts
    from stages.lib.training.loop import train

    causal = ctx.inputs["model"]
    preferences = open_preferences(ctx, params, with_margins=params.margin_from == "column")
    require_fixed_prompts(preferences.tokenizer)
    tokenizer, heldout_pairs = preferences.tokenizer, preferences.heldout
    own_padding_id = tokenizer.pad_token_id
    padding_id = choose_padding(tokenizer, preferences.train.last_ids() | heldout_pairs.last_ids())
    collate = collate_pairs(padding_id)
    objective = RewardObjective(params)
    initial = initial_weights(ctx, lambda: add_reward_head(causal, padding_id))
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForSequenceClassification, initial),
        tokenizer=causal if padding_id == own_padding_id else tokenizer,
        data=preferences.train,
        collate=collate,
        objective=objective,
        evaluate=lambda evaluator: evaluate(evaluator, heldout_pairs, collate, objective),
    )
    metrics = {
        **trained.after,
        "heldout_accuracy_random": 0.5,
        "heldout_accuracy_base": trained.before["heldout_accuracy"],
        "heldout_accuracy_longer": accuracy_of_length(heldout_pairs.answer_lengths()),
        "heldout_loss_base": trained.before["heldout_loss"],
        "heldout_calibration_error_base": trained.before["heldout_calibration_error"],
        "train_loss": trained.train_loss,
        **preferences.ledger.metrics(),
    }
    scores = published_scores(ctx.out)
    return Result(metrics, preferences.facts(params, trained, head_type=HEAD_TYPE, fixed_prompt_scores=scores))


STAGE = Stage(
    kind="reward",
    version=5,
    summary="a reward model: which of two answers is better, as a score for each",
    params=RewardParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "preferences": accepts(Kind.PREFERENCES),
        "extends": accepts(Kind.REWARD_MODEL, optional=True),
    },
    output=Kind.REWARD_MODEL,
    run=run,
    headline=("heldout_accuracy", "heldout_accuracy_base", "heldout_accuracy_longer", "heldout_margin"),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


class RewardObjective:
    """`preference_losses.reward_loss`, summed over pairs."""

    def __init__(self, params: RewardParams) -> None:
        self.margin = params.margin
        self.options: dict[str, Any] = {
            "label_smoothing": params.label_smoothing,
            "center_rewards_coefficient": params.center_rewards_coefficient,
        }

    def losses(
        self, chosen_N: torch.Tensor, rejected_N: torch.Tensor, margin_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One loss a pair. `margin_N` is there where pairs were opened with their margins."""
        from stages.lib.formulas.preference_losses import reward_loss

        margin = self.margin if margin_N is None else margin_N
        return reward_loss(chosen_N, rejected_N, margin=margin, **self.options)

    def count(self, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.pairs import num_pairs

        return num_pairs(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.reward_models import scores

        chosen_N, rejected_N = scores(model, batch).chunk(2)
        return self.losses(chosen_N, rejected_N, batch.get("margin_N")).sum()


def evaluate(evaluator: Evaluator, pairs: Pairs, collate: Collate, objective: RewardObjective) -> dict[str, float]:
    """The metrics on held-out pairs."""
    from stages.lib.preferring.reward_models import scores

    def measure(model: torch.nn.Module, batch: Tensors) -> Tensors:
        chosen_N, rejected_N = scores(model, batch).chunk(2)
        return {"chosen": chosen_N, "rejected": rejected_N}

    found = evaluator.values(pairs, collate, measure)
    return heldout_metrics(found["chosen"], found["rejected"], pairs, objective)


def heldout_metrics(
    chosen_N: torch.Tensor, rejected_N: torch.Tensor, pairs: Pairs, objective: RewardObjective
) -> dict[str, float]:
    """What the scores of all held-out pairs say: who wins, how surely and whether rightly so, and where the scores lie."""
    import torch

    from stages.lib.formulas.calibration import preference_calibration_error, wins
    from stages.lib.preferring.answers import accuracy_by_category, wins_by_category
    from stages.lib.preferring.reward_models import score_distribution

    wins_N = wins(chosen_N, rejected_N)
    margin_N = None if pairs.margin_N is None else torch.from_numpy(pairs.margin_N)
    of_categories = wins_by_category(wins_N, {"category_N2": torch.from_numpy(pairs.category_N2)}, pairs.categories)
    sums = {name: float(value) for name, value in of_categories.items()}
    return {
        "heldout_accuracy": float(wins_N.mean()),
        "heldout_loss": float(objective.losses(chosen_N, rejected_N, margin_N).mean()),
        "heldout_margin": float((chosen_N - rejected_N).mean()),
        "heldout_score": float((chosen_N + rejected_N).mean() / 2),
        "heldout_calibration_error": preference_calibration_error(chosen_N, rejected_N),
        **score_distribution(chosen_N, rejected_N),
        **accuracy_by_category({"pairs": len(wins_N), **sums}, pairs.categories),
    }


def published_scores(folder: Path) -> dict[str, float]:
    """The fixed prompts' scores by the model as it was published and is read again: whoever loads it can compare."""
    from stages.lib.preferring.reward_models import fixed_prompt_scores, load_reward_model
    from stages.lib.processes.collectives import from_main

    return from_main(lambda: fixed_prompt_scores(*load_reward_model(folder)))
