"""What a model says of both answers of a pair, and how often it prefers the chosen one.

N: pairs, T: tokens of a padded sequence, V: vocabulary, K: answer tokens of a batch. A micro batch of N pairs is 2N
sequences, the N chosen ones first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from stages.lib.formulas.calibration import wins
from stages.lib.formulas.token_losses import IGNORE, Tensors, next_tokens
from stages.lib.models.asking import without_cache
from stages.lib.training.evaluating import Metrics


def answer_logprobs(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
    """log p(answer | prompt) of each of the 2N sequences: the sum over the answer's tokens, in float32."""
    options = {"attention_mask": batch["attention_mask"], **without_cache(model)}
    logits_BTV = model(input_ids=batch["input_ids"], **options).logits
    targets_BT = next_tokens(batch["input_ids"], batch["answer_mask"])
    asked_BT = targets_BT != IGNORE
    # Only the answers' positions are brought to float32: with long prompts most of the logits are not needed.
    logp_K = -cross_entropy(logits_BTV[asked_BT].float(), targets_BT[asked_BT], reduction="none")
    zeros_BT = torch.zeros(asked_BT.shape, dtype=logp_K.dtype, device=logp_K.device)
    return zeros_BT.masked_scatter(asked_BT, logp_K).sum(dim=1)


def answer_tokens(batch: Tensors) -> torch.Tensor:
    """The number of answer tokens of each of the 2N sequences."""
    return batch["answer_mask"][:, 1:].sum(dim=1)


def wins_by_category(wins_N: torch.Tensor, batch: Tensors, categories: Sequence[str]) -> Tensors:
    """`wins_k` and `pairs_k` per category number k, to be summed over batches."""
    sums = {}
    for number in range(len(categories)):
        of_category_N = (batch["category_N2"] == number).any(dim=1)
        sums[f"wins_{number}"] = wins_N[of_category_N].sum()
        sums[f"pairs_{number}"] = of_category_N.sum()
    return sums


def accuracy_by_category(sums: Mapping[str, float], categories: Sequence[str]) -> Metrics:
    """`heldout_accuracy_of_<category>` of each source and corruption, but for one that all `pairs` are of."""
    return {
        f"heldout_accuracy_of_{name}": sums[f"wins_{number}"] / sums[f"pairs_{number}"]
        for number, name in enumerate(categories)
        if sums[f"pairs_{number}"] < sums["pairs"]
    }


def accuracy_of_length(answer_tokens_N2: NDArray[np.int64]) -> float:
    """How often the chosen answer is the longer one, ties counted one half: what preferring length achieves."""
    return float(wins(*torch.from_numpy(answer_tokens_N2).unbind(1)).mean())
