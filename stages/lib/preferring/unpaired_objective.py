"""What is learned from single answers that are desirable or not, and what is measured of it.

N: answers of a micro batch, or of all held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from stages.lib.formulas.calibration import area_under_roc, wins
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.drawing import evaluating
from stages.lib.preferring.answers import answer_logprobs
from stages.lib.preferring.unpaired import MISMATCHED, Unpaired
from stages.lib.preferring.unpaired_params import UnpairedParams
from stages.lib.processes.collectives import all_reduce_sum
from stages.lib.text.batches import Collate
from stages.lib.training.evaluating import Evaluator, Metrics

LEAST_BALANCE, MOST_BALANCE = 1.0, 4 / 3
"""What the desirable answers are to weigh together, of what the undesirable ones do: Ethayarajh et al. (2024), equation 8."""


class UnpairedObjective:
    """The loss that `params` names, summed over answers.

    KTO's reference point is asked of all rows of a step before any of them is learned from: it is a mean over the step, in
    all processes, and the same for all its micro batches.
    """

    def __init__(self, params: UnpairedParams) -> None:
        self.params = params
        self.loss = params.unpaired_loss
        self.kl = 0.0
        """The reference point of the step."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        return self.losses_of(log_ratios(model, batch), batch["desirable_N"], self.kl).sum()

    def look_ahead(self, model: torch.nn.Module, batches: Iterable[Tensors]) -> None:
        """Takes the reference point from the step's mismatched answers."""
        if not self.loss.needs_kl:
            return
        sums = [0.0, 0.0]
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                ratio_N = log_ratios(model, mismatched_part(batch)).double()
                sums = [sums[0] + float(ratio_N.sum()), sums[1] + len(ratio_N)]
        total, count = all_reduce_sum(sums)
        self.kl = reference_point(total / count)

    def losses_of(self, ratio_N: torch.Tensor, desirable_N: torch.Tensor, kl: float) -> torch.Tensor:
        """N weighted losses."""
        options = {"kl": kl} if self.loss.needs_kl else {}
        loss_N: torch.Tensor = self.loss.function(ratio_N, desirable_N, beta=self.params.beta, **options)
        return loss_N * torch.where(desirable_N, self.params.desirable_weight, self.params.undesirable_weight)

    # What is measured

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """The log-ratio of each answer, and of each mismatched one."""
        found = {"ratio": log_ratios(model, batch)}
        if self.loss.needs_kl:
            found["mismatched"] = log_ratios(model, mismatched_part(batch))
        return found

    def heldout_metrics(self, evaluator: Evaluator, rows: Unpaired, collate: Collate) -> Metrics:
        """What `measure` says of all rows, with the reference point of all of them together.

        What compares desirable answers with others is missing where there are none of either kind.
        """
        found = evaluator.values(rows, collate, self.measure)
        ratio_N, desirable_N = found["ratio"], torch.from_numpy(rows.desirable_N)
        kl = reference_point(float(found["mismatched"].mean())) if self.loss.needs_kl else 0.0
        right_N = wins(torch.where(desirable_N, ratio_N - kl, kl - ratio_N), ratio_N.new_zeros(()))
        metrics = {
            "heldout_loss": float(self.losses_of(ratio_N, desirable_N, kl).mean()),
            "heldout_accuracy": float(right_N.mean()),
            **accuracy_by_source(right_N.numpy(), rows),
            **({"heldout_kl": kl} if self.loss.needs_kl else {}),
        }
        sides = {"desirable": ratio_N[desirable_N], "undesirable": ratio_N[~desirable_N]}
        metrics |= {f"heldout_{name}_logprob_change": float(each.mean()) for name, each in sides.items() if len(each)}
        if all(len(each) for each in sides.values()):
            metrics["heldout_auc"] = area_under_roc(ratio_N, desirable_N)
            metrics["heldout_margin"] = self.params.beta * float(
                sides["desirable"].mean() - sides["undesirable"].mean()
            )
        return metrics


def reference_point(mean_ratio: float) -> float:
    """z of KTO: the mean log-ratio of mismatched answers, and 0 where that is below 0, as no divergence is."""
    return max(0.0, mean_ratio)


def mismatched_part(batch: Tensors) -> Tensors:
    """The micro batch of mismatched answers, under the names of one."""
    return {name.removeprefix(MISMATCHED): tensor for name, tensor in batch.items() if name.startswith(MISMATCHED)}


def log_ratios(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
    """log(pi / pi_ref) of each of the N answers."""
    logp_N = answer_logprobs(model, batch)
    return logp_N - batch["reference_N"].to(logp_N.dtype)


def accuracy_by_source(right_N: NDArray[np.float64], rows: Unpaired) -> Metrics:
    """`heldout_accuracy_of_<source>`, where rows are of several."""
    names = sorted(set(rows.source_N.tolist()) - {""})
    found = {name: right_N[rows.source_N == name] for name in names}
    return {f"heldout_accuracy_of_{name}": float(each.mean()) for name, each in found.items() if len(each) < len(rows)}


def unpaired_baselines(rows: Unpaired, reference_N: NDArray[np.float64]) -> Metrics:
    """How well desirable answers are told from others by what the reference gives them, in all and per token, by their length,
    and by calling all of them what most are. The first three are missing where there are none of either kind.
    """
    tokens_N, share = rows.answer_lengths(), float(rows.desirable_N.mean())
    found = {"heldout_accuracy_majority": max(share, 1 - share)}
    if 0 < share < 1:
        desirable_N = torch.from_numpy(rows.desirable_N)
        by = {"base": reference_N, "base_per_token": reference_N / tokens_N, "longer": tokens_N}
        found |= {
            f"heldout_auc_{name}": area_under_roc(torch.from_numpy(each), desirable_N) for name, each in by.items()
        }
    return found


def told_balance(params: UnpairedParams, desirable_N: NDArray[np.bool_]) -> str:
    """How many training answers there are of either kind, for the journal, and which weights would balance them."""
    good = int(desirable_N.sum())
    bad = len(desirable_N) - good
    said = f"{good:,} desirable and {bad:,} undesirable training answers"
    if not good or not bad:
        return f"{said}: nothing says what to {'avoid' if good else 'prefer'}"
    weighed = params.undesirable_weight * bad
    balance = params.desirable_weight * good / weighed if weighed else float("inf")
    if LEAST_BALANCE <= balance <= MOST_BALANCE:
        return f"{said}, which together weigh {balance:.3g} to 1"
    least, most = (bound * weighed / good for bound in (LEAST_BALANCE, MOST_BALANCE))
    advice = f"desirable_weight from {least:.4g} to {most:.4g} would make it 1 to 4/3, as KTO's authors advise"
    return f"{said}, which together weigh {balance:.3g} to 1" + (f": {advice}" if weighed else "")
