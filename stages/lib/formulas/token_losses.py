"""The losses of language models: which token is asked for where, its log-probability, and sums over a batch.

B: rows, T: tokens of a row, V: vocabulary. `targets_BT` holds, at each place, the id that the logits *of that place* are
to predict, or `IGNORE`: for a causal model the next token, for a masked one the token under the mask. Nothing is shifted
anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import cross_entropy

IGNORE = -100
"""A place where nothing is asked."""


TARGETS = "targets"
"""The key of `targets_BT` in a batch. Everything else in it is an argument of the model."""


Tensors = dict[str, torch.Tensor]


def next_tokens(ids_BT: torch.Tensor, asked_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Targets of a causal model: at place t the id at t + 1, where `asked_BT` is true of t + 1; none at the end."""
    targets_BT = torch.full_like(ids_BT, IGNORE)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    if asked_BT is not None:
        targets_BT[:, :-1][~asked_BT[:, 1:].bool()] = IGNORE
    return targets_BT


def token_logps(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target] of each place in float32, 0 where nothing is asked. Shape B x T."""
    return -cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none")


def cross_entropy_sum(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """- sum of log softmax(logits)[target] over the places where something is asked, in float32. A scalar.

    Only those places are brought to float32: in chats they are few, and the logits are the largest tensor there is.
    """
    asked_BT = targets_BT != IGNORE
    if not bool(asked_BT.all()):
        return cross_entropy(logits_BTV[asked_BT].float(), targets_BT[asked_BT], reduction="sum")
    return cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")


def num_asked(batch: Tensors) -> torch.Tensor:
    """How many tokens the batch asks for."""
    return (batch[TARGETS] != IGNORE).sum()


def logits_of(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
    """The model's logits, B x T x V, for everything in the batch but its targets."""
    inputs = {name: tensor for name, tensor in batch.items() if name != TARGETS}
    logits: torch.Tensor = model(**inputs).logits
    return logits


class TokenObjective:
    """The mean cross-entropy per token that is asked for, causal and masked models alike."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return num_asked(batch)

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        return cross_entropy_sum(logits_of(model, batch), batch[TARGETS])


def measure_tokens(model: torch.nn.Module, batch: Tensors) -> Tensors:
    """Sums over the tokens asked for: `nats`, `tokens`, and `correct`, how many have the highest logit."""
    logits_BTV = logits_of(model, batch)
    targets_BT = batch[TARGETS]
    asked_BT = targets_BT != IGNORE
    return {
        "nats": cross_entropy_sum(logits_BTV, targets_BT),
        "tokens": asked_BT.sum(),
        "correct": (logits_BTV[asked_BT].argmax(-1) == targets_BT[asked_BT]).sum(),
    }


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """`heldout_loss` (nats per token), `heldout_perplexity` (its exponential) and `heldout_token_accuracy`.

    A loss beyond 700, whose exponential is no number, counts as 700.
    """
    loss = sums["nats"] / sums["tokens"]
    return {
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(min(loss, 700.0)),
        "heldout_token_accuracy": sums["correct"] / sums["tokens"],
    }
