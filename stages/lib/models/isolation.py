"""Whether a model keeps the documents of a packed block apart, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import Problem, RecipeError
from stages.lib.formulas.token_losses import logits_of
from stages.lib.text.batches import Collate
from stages.lib.text.chat_rendering import special_ids


class Measured(Protocol):
    """A model that can be asked, as an `Evaluator` holds it."""

    device: torch.device

    def forward(self, compute: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
        """`compute(model)` in evaluation mode and without gradients, the same in every process."""


def require_isolation(evaluator: Measured, collate: Collate, plain_ids: Sequence[int], length: int) -> None:
    """Raises `RecipeError` if what one document says changes what the model makes of the next one in its block.

    Tried on the model itself, because whether an architecture and its attention keep documents apart cannot be told from
    their names: two blocks that differ in their first document only must have the same logits, bit for bit, in the second.
    """
    half = max(1, min(8, length // 2))
    first, other, second = plain_ids
    logits = []
    for token in (first, other):
        row = {
            "input_ids": np.array([token] * half + [second] * half),
            "position_ids": np.array([*range(half), *range(half)]),
            "position": 0,
        }
        batch = {name: tensor.to(evaluator.device) for name, tensor in collate([row]).items()}
        try:
            logits.append(evaluator.forward(partial(logits_of, batch=batch)))
        except TypeError as error:
            raise cannot_isolate(f"its forward pass takes no such argument: {error}") from error
    if not torch.equal(logits[0][:, half:], logits[1][:, half:]):
        raise cannot_isolate("a document changes what the model makes of the next one")


def plain_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Three ids that are nothing special, for `require_isolation`."""
    return sorted(set(range(len(tokenizer))) - special_ids(tokenizer))[:3]


def cannot_isolate(why: str) -> RecipeError:
    return RecipeError(
        Problem(
            "params.isolate_documents",
            f"is true, and this model cannot keep the documents of a block apart: {why}",
            "Set isolate_documents: false, or choose another model_type (llama, qwen3, gpt2, gpt_neox, bert and roberta can).",
        )
    )
