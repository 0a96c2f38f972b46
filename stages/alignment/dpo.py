"""`dpo`: direct preference optimization (Rafailov et al., 2023): a causal model learns from pairs, without a reward model.

What is learned is how much likelier than under the reference the chosen answer becomes, and the rejected one less likely.
The reference's log-probabilities come from its artifact, are computed once, before training, and are kept in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.formulas.bounds import Scale, Weight
from stages.lib.formulas.preference_losses import PREFERENCE_LOSSES, PreferenceLossName
from stages.lib.models.architectures import vocabulary_problems
from stages.lib.models.arithmetic import BYTES
from stages.lib.models.noise import noise_problems
from stages.lib.preferring.params import PreferenceParams, check_preference_training, estimate_preference_training
from stages.lib.text.template_date import on_template_date

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from stages.lib.formulas.token_losses import Tensors
    from stages.lib.preferring.pairs import Pairs
    from stages.lib.text.batches import Collate
    from stages.lib.training.evaluating import Evaluator


class DPOParams(PreferenceParams):
    """How the policy is trained."""

    loss: PreferenceLossName = "sigmoid"
    """What is minimized. sigmoid: DPO; hinge: max(0, 1 - margin); ipo: squared distance to a fixed margin, on log-probabilities averaged over tokens, which does not run away on pairs that are always preferred."""
    beta: Scale = 0.1
    """How dear it is to move away from the reference: the higher, the nearer the policy stays."""
    label_smoothing: Weight = Field(default=0.0, lt=0.5)
    """The share of pairs that are taken to be labelled the wrong way round. Only for the loss sigmoid."""

    @model_validator(mode="after")
    def smoothing_is_used(self) -> DPOParams:
        if self.label_smoothing and not PREFERENCE_LOSSES[self.loss].takes_label_smoothing:
            raise ValueError(f"label_smoothing has no effect with the loss {self.loss}: remove it, or take sigmoid")
        return self


def estimate(forecast: Forecast) -> Estimate:
    """The training's; its memory is that of the reference's pass where this takes more, as it may under ZeRO-3."""
    known = estimate_preference_training(forecast, without_dropout=True)
    reference = forecast.inputs.get("reference", forecast.inputs.get("model", Estimate())).parameters
    if known.memory_bytes_per_rank is None or reference is None:
        return known
    width = BYTES[forecast.params.precision] if forecast.resources.deepspeed else BYTES["fp32"]
    return replace(known, memory_bytes_per_rank=max(known.memory_bytes_per_rank, reference * width))


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong before the step runs: also a reference that cannot be of the same tokenizer."""
    hint = "Policy and reference must be of the same tokenizer."
    return [
        *check_preference_training(forecast),
        *vocabulary_problems(forecast, "reference", "model", hint),
        *noise_problems(forecast.inputs.get("model", Estimate()).architecture or {}),
    ]


@on_template_date
def run(ctx: Context, params: DPOParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.loading import load_model, without_dropout
    from stages.lib.preferring.opening import Preferences
    from stages.lib.preferring.pairs import collate_pairs
    from stages.lib.preferring.reference import ReferencePass
    from stages.lib.text.batches import padding_of
    from stages.lib.text.tokenizers import require_same_tokenizer
    from stages.lib.training.loop import train

    start = ctx.inputs["model"]
    reference = ctx.inputs.get("reference", start)
    if reference != start:
        require_same_tokenizer(start, reference, "inputs.reference")
    preferences = Preferences.open(ctx, params)

    # Before the training engine exists: from then on ZeRO-3 would split the reference too.
    reference_pass = ReferencePass(ctx, reference, [preferences.train, preferences.heldout], params.precision)
    train_logprobs_N2, heldout_logprobs_N2 = reference_pass.run(preferences.tokenizer)
    train_pairs = preferences.train.with_reference(train_logprobs_N2)
    heldout_pairs = preferences.heldout.with_reference(heldout_logprobs_N2)
    publish_logprobs(ctx, train_logprobs_N2, heldout_logprobs_N2)

    objective = DPOObjective(params)
    collate = collate_pairs(padding_of(preferences.tokenizer))
    trained = train(
        ctx,
        params,
        make_model=lambda: without_dropout(load_model(AutoModelForCausalLM, start)),
        tokenizer=start,
        data=train_pairs,
        collate=collate,
        objective=objective,
        evaluate=lambda evaluator: objective.heldout_metrics(evaluator, heldout_pairs, collate),
        without_dropout=True,
    )
    metrics = {
        **trained.after,
        **baselines(heldout_logprobs_N2, heldout_pairs.answer_lengths()),
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
    },
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("heldout_accuracy", "heldout_accuracy_base", "heldout_margin", "heldout_loss"),
    distributed=True,
    estimate=estimate,
    check=check,
)


class DPOObjective:
    """One of `preference_losses.PREFERENCE_LOSSES`, summed over pairs."""

    def __init__(self, params: DPOParams) -> None:
        self.loss = PREFERENCE_LOSSES[params.loss]
        self.options = {"beta": params.beta}
        if self.loss.takes_label_smoothing:
            self.options["label_smoothing"] = params.label_smoothing

    def count(self, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.pairs import num_pairs

        return num_pairs(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        from stages.lib.preferring.answers import answer_logprobs

        return self.losses(self.vectors(answer_logprobs(model, batch), batch)).sum()

    def vectors(self, logp_2N: torch.Tensor, batch: Tensors) -> list[torch.Tensor]:
        """`chosen_N, rejected_N, ref_chosen_N, ref_rejected_N`, as the loss wants them: sums over tokens, or means."""
        from stages.lib.preferring.answers import answer_tokens

        ref_2N = batch["reference_N2"].T.reshape(-1).to(logp_2N.dtype)
        if self.loss.averages_over_tokens:
            tokens_2N = answer_tokens(batch)
            logp_2N, ref_2N = logp_2N / tokens_2N, ref_2N / tokens_2N
        return [*logp_2N.chunk(2), *ref_2N.chunk(2)]

    def losses(self, vectors: list[torch.Tensor]) -> torch.Tensor:
        """One loss a pair."""
        return self.loss.function(*vectors, **self.options)

    def measure(self, model: torch.nn.Module, batch: Tensors, categories: Sequence[str]) -> Tensors:
        """Sums over pairs: who wins, by how much, and how far each answer moved away from the reference."""
        from stages.lib.formulas.calibration import wins
        from stages.lib.formulas.preference_losses import implicit_margin
        from stages.lib.preferring.answers import answer_logprobs, wins_by_category

        logp_2N = answer_logprobs(model, batch)
        vectors = self.vectors(logp_2N, batch)
        margin_N = implicit_margin(*vectors, beta=self.options["beta"])
        wins_N = wins(margin_N, margin_N.new_zeros(()))
        moved_N2 = logp_2N.view(2, -1).T - batch["reference_N2"]
        return {
            "pairs": margin_N.new_tensor(len(margin_N)),
            "wins": wins_N.sum(),
            "margin": margin_N.sum(),
            "loss": self.losses(vectors).sum(),
            "chosen": moved_N2[:, 0].sum(),
            "rejected": moved_N2[:, 1].sum(),
            "plain_wins": wins(*logp_2N.chunk(2)).sum(),
            **wins_by_category(wins_N, batch, categories),
        }

    def heldout_metrics(self, evaluator: Evaluator, pairs: Pairs, collate: Collate) -> dict[str, float]:
        """The means of what `measure` sums up, over all pairs."""
        from stages.lib.preferring.answers import accuracy_by_category

        sums = evaluator.sums(pairs, collate, partial(self.measure, categories=pairs.categories))
        means = {name: total / sums["pairs"] for name, total in sums.items()}
        return {
            "heldout_accuracy": means["wins"],
            "heldout_margin": means["margin"],
            "heldout_loss": means["loss"],
            "heldout_chosen_logprob_change": means["chosen"],
            "heldout_rejected_logprob_change": means["rejected"],
            "heldout_accuracy_plain": means["plain_wins"],
            **accuracy_by_category(sums, pairs.categories),
        }


PUBLISHED_LOGPROBS_BYTES = 64_000_000
"""The reference's log-probabilities are published with the model if they are no larger."""


def publish_logprobs(ctx: Context, train_N2: NDArray[np.float64], heldout_N2: NDArray[np.float64]) -> None:
    """Puts the reference's log-probabilities beside the model: `train` and `heldout`, N x (chosen, rejected)."""
    import numpy as np

    from stages.lib.processes.collectives import from_main

    if train_N2.nbytes + heldout_N2.nbytes <= PUBLISHED_LOGPROBS_BYTES:
        from_main(lambda: np.savez(ctx.out / "reference_logprobs.npz", train=train_N2, heldout=heldout_N2))


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
