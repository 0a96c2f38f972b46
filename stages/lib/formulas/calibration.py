"""Calibration: whether what a model says with 80% confidence is right in 80% of all cases.

N: answers, or pairs of them.
"""

from __future__ import annotations

import torch


def wins(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer has the higher value, 0 where it has the lower one, one half where they tie."""
    return ((chosen_N > rejected_N).double() + (chosen_N >= rejected_N).double()) / 2


def area_under_roc(score_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """How often a positive has a higher score than a negative one, ties counted one half: the area under the ROC curve.

    By ranks, of which equal scores have their mean (Mann and Whitney, 1947). Both kinds must be there.
    """
    _, places_N, counts = torch.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (counts.cumsum(0) - (counts - 1) / 2)[places_N].double()
    positives = int(positive_N.sum())
    above = float(rank_N[positive_N].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(score_N) - positives))


def correlation(a_N: torch.Tensor, b_N: torch.Tensor) -> float | None:
    """Pearson's: the mean product of both, each less its mean and by its deviation. None where one of them does not vary."""
    if len(a_N) < 2 or a_N.min() == a_N.max() or b_N.min() == b_N.max():
        return None
    return float(torch.corrcoef(torch.stack([a_N.double(), b_N.double()]))[0, 1].clamp(-1, 1))


NUM_BINS = 15
"""As many as Guo et al. (2017) take."""


def expected_calibration_error(
    confidence_N: torch.Tensor, correct_N: torch.Tensor, *, lowest: float = 0.0, num_bins: int = NUM_BINS
) -> float:
    """sum over bins b of |B_b| / N |accuracy(B_b) - confidence(B_b)|, from 0 (calibrated) to 1.

    Guo et al. (2017), equation 3: the bins are of equal width between `lowest` and 1, open below and closed above (the
    first holds `lowest`, too); of a bin, accuracy and confidence are the means. `correct_N` is 1, 0 or a share of 1.
    """
    confidence_N, correct_N = confidence_N.double(), correct_N.double()
    inner_edges = torch.linspace(lowest, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    bin_N = torch.bucketize(confidence_N, inner_edges)
    # |B_b| cancels: what is left of a bin is the sum of its differences.
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bin_N, correct_N - confidence_N)
    return float(gaps.abs().sum() / len(confidence_N))


def preference_calibration_error(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> float:
    """`expected_calibration_error` of the probability that a score model gives the answer that it prefers.

    By Bradley and Terry (1952), sigmoid(r_c - r_r) is the probability that the chosen answer wins. It always has won, so
    that this alone would leave nothing to be wrong about; asked which of the two wins, the model says the one with the
    higher score, with a confidence max(p, 1 - p) = sigmoid(|r_c - r_r|) between 1/2 and 1. A tie is half right.
    """
    confidence_N = torch.sigmoid((chosen_N.double() - rejected_N.double()).abs())
    return expected_calibration_error(confidence_N, wins(chosen_N, rejected_N), lowest=0.5)
