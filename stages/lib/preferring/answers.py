"""What a model says of both answers of a pair, and how often it prefers the chosen one.

N: pairs, T: tokens of a padded sequence, V: vocabulary, K: answer tokens of a batch. A micro batch of N pairs is 2N
sequences, the N chosen ones first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from stages.lib.formulas.calibration import wins
from stages.lib.formulas.token_losses import IGNORE, Tensors, next_tokens
from stages.lib.models.asking import without_cache
from stages.lib.text.batches import attention_mask, padded
from stages.lib.training.evaluating import Metrics

AnsweredSequence = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""The ids of a prompt and an answer to it, and 1 for each token of the answer, including the one that ends its turn."""


def batch_of_answers(sequences: Sequence[AnsweredSequence], padding_id: int) -> Tensors:
    """`input_ids`, `attention_mask` and `answer_mask`, B x T, padded on the right.

    What is padding is told by position, in the masks: an id never decides it.
    """
    ids, answers = [each for each, _ in sequences], [answer for _, answer in sequences]
    masks = {"attention_mask": attention_mask(ids), "answer_mask": padded(answers)}
    return {"input_ids": padded(ids, padding_id), **masks}


@dataclass(frozen=True)
class Answered:
    """What a model says of the answers of a micro batch, vectors of 2N in float32, one number for each sequence."""

    logp: torch.Tensor
    """log p(answer | prompt): the sum over the answer's tokens."""
    counted: torch.Tensor
    """The same sum with the tail of the longer answer of each pair weighted, if so asked."""
    likelihood: torch.Tensor | None = None
    """How much the answer is like what the model itself would say (`own_likelihood`), where asked for. No gradient."""


def ask_for_answers(
    model: torch.nn.Module, batch: Tensors, *, tail_weight: float | None = None, with_likelihood: bool = False
) -> Answered:
    """One forward pass over the 2N sequences. `tail_weight`: see `tail_weights`."""
    options = {"attention_mask": batch["attention_mask"], **without_cache(model)}
    logits_BTV = model(input_ids=batch["input_ids"], **options).logits
    targets_BT = next_tokens(batch["input_ids"], batch["answer_mask"])
    asked_BT = targets_BT != IGNORE
    # Only the answers' positions are brought to float32: with long prompts most of the logits are not needed.
    logits_KV = logits_BTV[asked_BT].float()
    logp_K = -cross_entropy(logits_KV, targets_BT[asked_BT], reduction="none")
    logp_BT = in_places(logp_K, asked_BT)
    logp_2N = counted_2N = logp_BT.sum(dim=1)
    if tail_weight is not None:
        counted_2N = (logp_BT * tail_weights(asked_BT, tail_weight)).sum(dim=1)
    likelihood_2N = own_likelihood(logits_KV, logp_K, asked_BT) if with_likelihood else None
    return Answered(logp_2N, counted_2N, likelihood_2N)


def answer_logprobs(model: torch.nn.Module, batch: Tensors, tail_weight: float | None = None) -> torch.Tensor:
    """log p(answer | prompt) of each of the 2N sequences: the sum over the answer's tokens, in float32."""
    return ask_for_answers(model, batch, tail_weight=tail_weight).counted


def in_places(values_K: torch.Tensor, asked_BT: torch.Tensor) -> torch.Tensor:
    """The values at the places that are asked for, in their order, and 0 elsewhere."""
    zeros_BT = torch.zeros(asked_BT.shape, dtype=values_K.dtype, device=values_K.device)
    return zeros_BT.masked_scatter(asked_BT, values_K)


def tail_weights(asked_BT: torch.Tensor, weight: float) -> torch.Tensor:
    """1 for the first tokens of each answer, as many as the shorter answer of its pair has, and `weight` for those behind.

    LD-DPO (Liu et al., 2024, length desensitization): log p = (1 - a) log p(first l tokens) + a log p(all).
    """
    lengths_2N = asked_BT.sum(dim=1)
    shorter_N = torch.minimum(*lengths_2N.chunk(2))
    beyond_BT = asked_BT.cumsum(dim=1) > torch.cat([shorter_N, shorter_N])[:, None]
    return torch.where(beyond_BT, weight, 1.0)


@torch.no_grad()
def own_likelihood(logits_KV: torch.Tensor, logp_K: torch.Tensor, asked_BT: torch.Tensor) -> torch.Tensor:
    """exp of the mean over an answer's tokens of log p(token) - log sum_v p(v)^2, for each sequence.

    WPO (Zhou et al., 2024), equation 2 with its sampled alignment: 1 in the mean of what the model itself would draw,
    however sure it is; their weight of a pair is the product of both answers'.
    """
    log_squares_K = (2 * logits_KV).logsumexp(dim=-1) - 2 * logits_KV.logsumexp(dim=-1)
    return (in_places(logp_K - log_squares_K, asked_BT).sum(dim=1) / asked_BT.sum(dim=1).clamp(min=1)).exp()


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
