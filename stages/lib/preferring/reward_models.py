"""Reward models: a causal model's body under a head that gives a whole chat one number.

The head reads the last token of the chat. Hugging Face classes find it by looking for the last id that is not the padding
id, so a padding id that can end a chat would make them read the wrong place: `choose_padding` sees to it that none can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Problem
from pipeline.store.artifact import MANIFEST, read_manifest
from stages.lib.models.asking import without_cache
from stages.lib.models.drawing import require_quiet
from stages.lib.models.loading import load_model
from stages.lib.text.chat_spans import encode_chat
from stages.lib.text.chat_template import Messages
from stages.lib.text.template_date import DEFAULT, telling
from stages.lib.text.tokenizers import load_tokenizer

HEAD_TYPE = "reward"


FIXED_PROMPTS: dict[str, Messages] = {
    "greeting": [
        {"role": "user", "content": "Good morning! How are you?"},
        {"role": "assistant", "content": "Good morning! I am well, thank you. What can I do for you?"},
    ],
    "arithmetic": [
        {"role": "user", "content": "What is seven times eight?"},
        {"role": "assistant", "content": "56"},
    ],
    "two_turns": [
        {"role": "user", "content": "Name a large river."},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "And where does it end?"},
        {"role": "assistant", "content": "I do not care. Look it up yourself."},
    ],
}
"""Chats whose scores stand in every reward model's manifest. No system message: some templates refuse those. Changing one
means raising the reward stage's version."""


SCORE_TOLERANCE = 0.01
"""How far a score may be from the manifest's, relative to it where it is above 1. Devices and libraries differ by far
less; a head that was not loaded, or other special tokens, by far more."""


def scores(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One score per sequence, in float32."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **without_cache(model))
    return output.logits.squeeze(-1).float()


@torch.inference_mode()
def score_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]) -> list[float]:
    """The score of each chat, each one in a forward pass of its own, so that no other decides its last bits."""
    found = []
    for chat in chats:
        ids = torch.tensor([encode_chat(tokenizer, chat, mask_from=len(chat) - 1).input_ids], device=model.device)
        found.append(float(scores(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]))
    return found


PERCENTILES = (5, 25, 50, 75, 95)


def score_distribution(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> dict[str, float]:
    """Where held-out scores lie, as metrics: the mean of either side; of both together standard deviation and percentiles.

    The deviation divides by the number of scores; percentiles lie on the line between the two nearest scores.
    """
    scores_2N = torch.cat([chosen_N, rejected_N]).double().numpy()
    percentiles = np.percentile(scores_2N, PERCENTILES)
    return {
        "heldout_score_mean_chosen": float(chosen_N.double().mean()),
        "heldout_score_mean_rejected": float(rejected_N.double().mean()),
        "heldout_score_deviation": float(scores_2N.std()),
        **{f"heldout_score_percentile_{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def require_fixed_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `DataError` if one of `FIXED_PROMPTS` cannot be encoded: better before training than when all is done."""
    for chat in FIXED_PROMPTS.values():
        encode_chat(tokenizer, chat, mask_from=len(chat) - 1)


def fixed_prompt_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Name -> score of each of `FIXED_PROMPTS`, on the same date whoever asks."""
    with telling(DEFAULT):
        return dict(zip(FIXED_PROMPTS, score_chats(model, tokenizer, list(FIXED_PROMPTS.values())), strict=True))


def load_reward_model(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a reward model, in float32, ready for inference.

    Raises `ArtifactError` if the head or anything else would be new, if it gives more than one score, if it gives another one
    each time, or if it does not score the fixed prompts as its manifest says.
    """
    model = load_model(AutoModelForSequenceClassification, folder).to(device).eval()
    require_quiet(model, str(folder))
    tokenizer = load_tokenizer(folder)
    problem = None
    if model.config.num_labels != 1:
        problem = f"gives {model.config.num_labels} scores, and a reward model gives one"
    elif model.config.get_text_config().pad_token_id != tokenizer.pad_token_id or tokenizer.pad_token_id is None:
        problem = "its config.json and its tokenizer do not name the same padding token"
    if problem:
        raise ArtifactError(Problem(str(folder), problem, "Name the artifact of a reward stage."))
    if (folder / MANIFEST).exists():
        require_scores(folder, model, tokenizer)
    return model, tokenizer


def require_scores(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ArtifactError` unless the model scores the fixed prompts as the manifest in `folder` says."""
    facts = read_manifest(folder).facts
    if facts.head_type != HEAD_TYPE:
        raise ArtifactError(
            Problem(str(folder), f"has a head of the type {facts.head_type}, not {HEAD_TYPE}", "Name a reward model.")
        )
    expected: dict[str, Any] = facts.fixed_prompt_scores or {}
    found = fixed_prompt_scores(model, tokenizer)
    if set(expected) != set(found):
        raise ArtifactError(
            Problem(str(folder), f"has scores for {sorted(expected)}, not for {sorted(found)}", "Train it again.")
        )
    for name, score in expected.items():
        if not abs(found[name] - score) <= SCORE_TOLERANCE * max(1.0, abs(score)):
            raise ArtifactError(
                Problem(
                    str(folder),
                    f"scores the fixed prompt {name} with {found[name]:.4f}; when it was published it was {score:.4f}",
                    "Its weights, its head or its tokenizer are not those that were trained: train it again.",
                )
            )
