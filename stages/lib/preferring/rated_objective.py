"""What is learned from single answers that are good or bad, or rated, and what is measured of it.

N: answers of a micro batch, or of all held-out rows, H: heads, A: attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from stages.lib.formulas.calibration import area_under_roc, correlation, wins
from stages.lib.formulas.reward_losses import binary_loss
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.bootstrap import mean_over_heads
from stages.lib.preferring.rated import RatedAnswers
from stages.lib.preferring.reward_models import head_deviation, outputs
from stages.lib.preferring.reward_reading import RewardReading
from stages.lib.preferring.scoring_params import ScoringParams, metric_name
from stages.lib.text.batches import Collate
from stages.lib.training.evaluating import Evaluator, Metrics


class RatedObjective:
    """A loss of each rating that there is, in the mean over heads, summed over ratings."""

    def __init__(self, params: ScoringParams, role: str) -> None:
        reading = params.reading_of(role)
        assert isinstance(reading, RewardReading)
        self.reading = reading
        self.is_binary = role == "unpaired_preferences"
        self.loss: Callable[..., torch.Tensor] = binary_loss if self.is_binary else params.loss_of_ratings.function
        needs_levels = not self.is_binary and params.loss_of_ratings.needs_levels
        self.options = {"levels": params.rating_levels} if needs_levels else {}

    def count(self, batch: Tensors) -> torch.Tensor:
        return batch["rated_NA"].sum()

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        output_NHA = outputs(model, batch).unflatten(1, (self.reading.heads, -1))
        target_N1A, rated_N1A = batch["target_NA"][:, None], batch["rated_NA"][:, None]
        loss_NHA = self.loss(output_NHA, target_N1A.expand_as(output_NHA), **self.options)
        return mean_over_heads(torch.where(rated_N1A, loss_NHA, 0.0), batch).sum()

    # What is measured

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """Each output of the model, a vector of N."""
        return {str(number): each for number, each in enumerate(outputs(model, batch).unbind(1))}

    def heldout_metrics(self, evaluator: Evaluator, rows: RatedAnswers, collate: Collate) -> Metrics:
        found = evaluator.values(rows, collate, self.measure)
        output_NO = torch.stack([found[str(number)] for number in range(self.reading.num_outputs)], dim=1)
        return self.metrics_of(output_NO, rows)

    def metrics_of(self, output_NO: torch.Tensor, rows: RatedAnswers) -> Metrics:
        """What the outputs for all held-out rows say; those of the heads are averaged, but for the deviation between them."""
        target_NA = torch.from_numpy(rows.target_NA)
        rated_NA = ~target_NA.isnan()
        mean_NA = output_NO.unflatten(1, (self.reading.heads, -1)).mean(dim=1)
        loss_NA = self.loss(mean_NA, target_NA.nan_to_num(), **self.options)
        metrics = {
            "heldout_loss": float(loss_NA[rated_NA].mean()),
            "heldout_score": float(self.reading.score(output_NO).mean()),
            **head_deviation(self.reading, output_NO),
        }
        if self.is_binary:
            return {**metrics, **binary_metrics(mean_NA[:, 0], target_NA[:, 0].bool(), rows)}
        return {**metrics, **self.rating_metrics(mean_NA, target_NA, rated_NA)}

    def rating_metrics(self, mean_NA: torch.Tensor, target_NA: torch.Tensor, rated_NA: torch.Tensor) -> Metrics:
        """Squared error and correlation of each attribute and of all: the error over all ratings, the correlation of the scores
        of rows that rate all attributes with what the same weights make of their ratings.
        """
        square_NA = (mean_NA - target_NA).square()
        metrics = {"heldout_mse": float(square_NA[rated_NA].mean())}
        for number, name in enumerate(self.reading.attributes):
            rated_N, called = rated_NA[:, number], metric_name(name)
            if rated_N.any():
                metrics[f"heldout_mse_of_{called}"] = float(square_NA[rated_N, number].mean())
            found = correlation(mean_NA[rated_N, number], target_NA[rated_N, number])
            metrics |= {} if found is None else {f"heldout_correlation_of_{called}": found}
        whole_N, weight_A = rated_NA.all(dim=1), torch.tensor(self.reading.weights, dtype=mean_NA.dtype)
        found = correlation(mean_NA[whole_N] @ weight_A, target_NA[whole_N] @ weight_A)
        return metrics if found is None else {**metrics, "heldout_correlation": found}

    def baselines(self, train: RatedAnswers, heldout: RatedAnswers, before: Mapping[str, float]) -> Metrics:
        """What the fresh head says, and what needs no model: the mean rating of training, or the more frequent kind; length."""
        names = ("loss", "accuracy", "auc", "mse", "correlation")
        found = {f"heldout_{name}_base": before[f"heldout_{name}"] for name in names if f"heldout_{name}" in before}
        if not self.is_binary:
            square_NA = (heldout.target_NA - np.nanmean(train.target_NA, axis=0)) ** 2
            return {**found, "heldout_mse_mean": float(np.nanmean(square_NA))}
        good_N = heldout.target_NA[:, 0] == 1
        share = float(good_N.mean())
        found["heldout_accuracy_majority"] = max(share, 1 - share)
        if 0 < share < 1:
            lengths_N = torch.from_numpy(heldout.answer_lengths())
            found["heldout_auc_longer"] = area_under_roc(lengths_N, torch.from_numpy(good_N))
        return found


def binary_metrics(score_N: torch.Tensor, good_N: torch.Tensor, rows: RatedAnswers) -> Metrics:
    """How often the score is on its side of 0, ties counted one half, in all and of each source; and the area under the ROC
    curve, where both kinds are there.
    """
    right_N = wins(torch.where(good_N, score_N, -score_N), torch.zeros_like(score_N))
    metrics = {"heldout_accuracy": float(right_N.mean())}
    for name in sorted(set(rows.source_N.tolist()) - {""}):
        of_source_N = torch.from_numpy(rows.source_N == name)
        if not of_source_N.all():
            metrics[f"heldout_accuracy_of_{name}"] = float(right_N[of_source_N].mean())
    if 0 < int(good_N.sum()) < len(good_N):
        metrics["heldout_auc"] = area_under_roc(score_N, good_N)
    return metrics
