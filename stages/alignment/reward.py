"""`reward`: a reward model, trained on one of four sorts of data: pairs of answers, of which the chosen one is to score higher;
single answers that are good or bad; answers that are rated, by one attribute or several; or answers whose steps are labelled.

The input is one mixed data set. Several sets are sources of its mix, in the shares that the mix gives them; held-out
accuracy is then told for each of them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.models.arithmetic import completed, field_of
from stages.lib.models.families import scoring_problems
from stages.lib.preferring.params import check_preference_training, estimate_preference_training
from stages.lib.preferring.reward_reading import RewardReading, StepsReading
from stages.lib.preferring.scoring_params import REWARD_ROLES, ScoringParams, reward_input_problems, reward_role
from stages.lib.text.template_date import on_template_date
from stages.lib.training.extension import EXTENSION_PARAMS

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from stages.lib.formulas.token_losses import Tensors
    from stages.lib.preferring.opening import Preferences
    from stages.lib.preferring.pairs import Pairs
    from stages.lib.text.batches import Collate
    from stages.lib.training.carrying import Objective
    from stages.lib.training.evaluating import Evaluator, Metrics


class RewardParams(ScoringParams):
    """How the reward model is trained."""


def estimate(forecast: Forecast) -> Estimate:
    """The causal model's, with a head of so many outputs in place of the one over the vocabulary."""
    role = next((role for role in REWARD_ROLES if role in forecast.inputs), "preferences")
    rows, sequences = forecast.inputs.get(role, Estimate()).train_rows, 2 if role == "preferences" else 1
    known = estimate_preference_training(forecast, num_rows=rows, sequences=sequences)
    reading = forecast.params.reading_of(role)
    if known.architecture:
        known = replace(known, architecture={**known.architecture, **reading.config})
    architecture = known.architecture or {}
    hidden, vocabulary = field_of(architecture, "hidden_size"), field_of(architecture, "vocab_size")
    if known.parameters is None or hidden is None or vocabulary is None:
        return known
    language_head = 0 if (completed(architecture) or architecture).get("tie_word_embeddings") else hidden * vocabulary
    outputs = reading.num_outputs
    head = hidden * outputs + (outputs if role == "step_labels" else 0)  # heads of tokens have a bias
    trained = None if known.trained_parameters is None else known.trained_parameters + head
    return replace(known, parameters=known.parameters - language_head + head, trained_parameters=trained)


def check(forecast: Forecast) -> list[Problem]:
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    return [
        *reward_input_problems(forecast),
        *check_preference_training(forecast),
        *scoring_problems(architecture),
    ]


def kind_of_reward(params: RewardParams, inputs: Mapping[str, Kind]) -> Kind:
    return Kind.PROCESS_REWARD_MODEL if "step_labels" in inputs else Kind.REWARD_MODEL


@on_template_date
def run(ctx: Context, params: RewardParams) -> Result:
    from stages.lib.models.heads import add_reward_head, choose_padding
    from stages.lib.models.loading import initial_weights, load_model
    from stages.lib.preferring.reward_models import HEAD_TYPE, STEPS_HEAD_TYPE, require_fixed_prompts, scored_class
    from stages.lib.training.loop import train

    causal, task = ctx.inputs["model"], open_task(ctx, params)
    preferences, reading = task.preferences, task.reading
    require_fixed_prompts(preferences.tokenizer)
    tokenizer = preferences.tokenizer
    own_padding_id = tokenizer.pad_token_id
    padding_id = choose_padding(tokenizer, preferences.train.last_ids() | preferences.heldout.last_ids())
    collate = task.collate(padding_id)
    of_steps = "step_labels" in ctx.inputs
    head = {"num_outputs": reading.num_outputs, "of_tokens": of_steps, "config": reading.config}
    initial = initial_weights(ctx, lambda: add_reward_head(causal, padding_id, **head))
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(scored_class(reading), initial),
        tokenizer=causal if padding_id == own_padding_id else tokenizer,
        data=task.data,
        collate=collate,
        objective=task.objective,
        evaluate=lambda evaluator: task.evaluate(evaluator, collate),
    )
    metrics = {
        **trained.after,
        **task.baselines(trained.before),
        "train_loss": trained.train_loss,
        **preferences.ledger.metrics(),
    }
    scores = published_scores(ctx.out)
    head_type = STEPS_HEAD_TYPE if of_steps else HEAD_TYPE
    return Result(metrics, preferences.facts(params, trained, head_type=head_type, fixed_prompt_scores=scores))


STAGE = Stage(
    kind="reward",
    version=5,
    summary="a reward model: how good an answer is, or how right each of its steps",
    params=RewardParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "preferences": accepts(Kind.PREFERENCES, optional=True),
        "unpaired_preferences": accepts(Kind.UNPAIRED_PREFERENCES, optional=True),
        "ratings": accepts(Kind.RATINGS, optional=True),
        "step_labels": accepts(Kind.STEP_LABELS, optional=True),
        "extends": accepts(Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL, optional=True),
    },
    output=kind_of_reward,
    run=run,
    headline=(
        *("heldout_accuracy", "heldout_accuracy_base", "heldout_accuracy_longer", "heldout_margin"),
        *("heldout_auc", "heldout_mse", "heldout_mse_mean", "heldout_correlation"),
    ),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


@dataclass(frozen=True)
class RewardTask:
    """What is learned from one sort of input, and how."""

    preferences: Preferences[Any]
    reading: RewardReading | StepsReading
    data: Sequence[dict[str, Any]]
    """The training rows, weighted where heads have samples of their own."""
    objective: Objective
    collate: Callable[[int], Collate]
    """Padding id -> what makes batches of rows."""
    evaluate: Callable[[Evaluator, Collate], Metrics]
    baselines: Callable[[Mapping[str, float]], Metrics]
    """What was measured before training -> metrics beside those of the trained model."""


def open_task(ctx: Context, params: RewardParams) -> RewardTask:
    """What the input that is there asks for. Raises `DataError` where its rows cannot be used."""
    from stages.lib.preferring.bootstrap import WeightedRows, bootstrap_weights

    role = reward_role(ctx.inputs)
    task = {"preferences": pairs_task, "step_labels": steps_task}.get(role, rated_task)(ctx, params, role)
    if not params.bootstrap:
        return task
    return replace(task, data=WeightedRows(task.data, bootstrap_weights(ctx.seed, len(task.data), params.heads)))


def pairs_task(ctx: Context, params: RewardParams, role: str) -> RewardTask:
    from stages.lib.preferring.answers import accuracy_of_length
    from stages.lib.preferring.bootstrap import collate_weighted
    from stages.lib.preferring.opening import open_preferences
    from stages.lib.preferring.pairs import collate_pairs

    preferences = open_preferences(ctx, params, with_margins=params.margin_from == "column")
    objective, heldout = RewardObjective(params), preferences.heldout

    def baselines(before: Mapping[str, float]) -> Metrics:
        return {
            "heldout_accuracy_random": 0.5,
            "heldout_accuracy_base": before["heldout_accuracy"],
            "heldout_accuracy_longer": accuracy_of_length(heldout.answer_lengths()),
            "heldout_loss_base": before["heldout_loss"],
            "heldout_calibration_error_base": before["heldout_calibration_error"],
        }

    return RewardTask(
        preferences,
        params.reading_of(role),
        preferences.train,
        objective,
        lambda padding_id: collate_weighted(collate_pairs(padding_id)),
        lambda evaluator, collate: evaluate(evaluator, heldout, collate, objective),
        baselines,
    )


def rated_task(ctx: Context, params: RewardParams, role: str) -> RewardTask:
    from stages.lib.preferring.bootstrap import collate_weighted
    from stages.lib.preferring.rated import collate_rated, open_rated
    from stages.lib.preferring.rated_objective import RatedObjective

    preferences, objective = open_rated(ctx, params, role), RatedObjective(params, role)
    return RewardTask(
        preferences,
        params.reading_of(role),
        preferences.train,
        objective,
        lambda padding_id: collate_weighted(collate_rated(padding_id)),
        lambda evaluator, collate: objective.heldout_metrics(evaluator, preferences.heldout, collate),
        lambda before: objective.baselines(preferences.train, preferences.heldout, before),
    )


def steps_task(ctx: Context, params: RewardParams, role: str) -> RewardTask:
    from stages.lib.preferring.labelled_steps import StepsObjective, collate_steps, open_steps

    preferences, objective = open_steps(ctx, params), StepsObjective(params)
    return RewardTask(
        preferences,
        params.reading_of(role),
        preferences.train,
        objective,
        collate_steps,
        lambda evaluator, collate: objective.heldout_metrics(evaluator, preferences.heldout, collate),
        lambda before: objective.baselines(preferences.heldout, before),
    )


class RewardObjective:
    """`preference_losses.reward_loss` in the mean over heads, summed over pairs."""

    def __init__(self, params: RewardParams) -> None:
        self.margin = params.margin
        self.reading = RewardReading(params.heads)
        self.options: dict[str, Any] = {
            "label_smoothing": params.label_smoothing,
            "center_rewards_coefficient": params.center_rewards_coefficient,
        }

    def losses(
        self, chosen_N: torch.Tensor, rejected_N: torch.Tensor, margin_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One loss a pair, or of N x H scores one a pair and head. `margin_N` is there where pairs were opened with margins."""
        from stages.lib.formulas.preference_losses import reward_loss

        margin = self.margin if margin_N is None else margin_N
        return reward_loss(chosen_N, rejected_N, margin=margin, **self.options)

    def count(self, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.pairs import num_pairs

        return num_pairs(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.bootstrap import mean_over_heads
        from stages.lib.preferring.reward_models import outputs

        chosen_NH, rejected_NH = outputs(model, batch).chunk(2)
        margin_N = batch.get("margin_N")
        loss_NH = self.losses(chosen_NH, rejected_NH, None if margin_N is None else margin_N[:, None])
        return mean_over_heads(loss_NH, batch).sum()


def evaluate(evaluator: Evaluator, pairs: Pairs, collate: Collate, objective: RewardObjective) -> dict[str, float]:
    """The metrics on held-out pairs: of an ensemble those of the heads' mean, and how far the heads are apart."""
    import torch

    from stages.lib.preferring.reward_models import head_deviation, outputs

    heads = range(objective.reading.heads)

    def measure(model: torch.nn.Module, batch: Tensors) -> Tensors:
        sides = zip(("chosen", "rejected"), outputs(model, batch).chunk(2), strict=True)
        return {f"{name}_{head}": score_NH[:, head] for name, score_NH in sides for head in heads}

    found = evaluator.values(pairs, collate, measure)
    chosen_NH, rejected_NH = (
        torch.stack([found[f"{name}_{head}"] for head in heads], dim=1) for name in ("chosen", "rejected")
    )
    return {
        **heldout_metrics(chosen_NH.mean(dim=1), rejected_NH.mean(dim=1), pairs, objective),
        **head_deviation(objective.reading, torch.cat([chosen_NH, rejected_NH])),
    }


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
