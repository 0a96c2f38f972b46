"""Reward models: a causal model's body under a head that gives a whole chat one number, or several, or each step of an answer two.

The head reads the last token of the chat. Hugging Face classes find it by looking for the last id that is not the padding
id, so a padding id that can end a chat would make them read the wrong place: `choose_padding` sees to it that none can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.errors import ArtifactError, Problem
from pipeline.store.artifact import MANIFEST, read_manifest
from stages.lib.formulas.reward_losses import score_of_steps
from stages.lib.models.asking import without_cache
from stages.lib.models.config import read_config
from stages.lib.models.drawing import require_quiet
from stages.lib.models.loading import load_model
from stages.lib.preferring.reward_reading import RewardReading, StepsReading, reading_in
from stages.lib.preferring.step_tokens import encode_steps, right_of_tokens, steps_of
from stages.lib.text.chat_spans import encode_chat
from stages.lib.text.chat_template import Messages
from stages.lib.text.template_date import DEFAULT, telling
from stages.lib.text.tokenizers import load_tokenizer

HEAD_TYPE = "reward"
STEPS_HEAD_TYPE = "process_reward"
PLAIN = RewardReading()
"""Of a model with one output, which is the score."""


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


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says, in float32: one row per sequence, of as many numbers as it has outputs; of a process reward model
    one row per token of each.
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **without_cache(model))
    logits: torch.Tensor = output.logits.float()
    return logits


def scores(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], reading: RewardReading | StepsReading = PLAIN
) -> torch.Tensor:
    """One score per sequence, in float32. `reading` says how the outputs become it; where they are of steps, the batch has
    `step_ends`, B x T, 1 at the last token of each.
    """
    output = outputs(model, batch)
    if isinstance(reading, RewardReading):
        return reading.score(output)
    right_BT = right_of_tokens(output).sigmoid()
    return torch.stack(
        [
            score_of_steps(right_T[ends_T.bool()], reading.answer_score)
            for right_T, ends_T in zip(right_BT, batch["step_ends"], strict=True)
        ]
    )


def reading_of(model: PreTrainedModel) -> RewardReading | StepsReading:
    """How the model's outputs become a score, as its config says."""
    return reading_in(model.config.to_dict(), model.config.name_or_path)


def head_deviation(reading: RewardReading, output_NO: torch.Tensor) -> dict[str, float]:
    """`heldout_head_deviation`: by how much the heads of an ensemble differ, in the mean over answers; nothing of one head."""
    if reading.heads == 1:
        return {}
    return {"heldout_head_deviation": float(reading.scores_by_head(output_NO).std(dim=1, correction=0).mean())}


def encode_scored(
    tokenizer: PreTrainedTokenizerBase, chat: Messages, reading: RewardReading | StepsReading
) -> tuple[list[int], list[int]]:
    """The ids of a chat as a reward model was trained on them, and 1 where it is read: at the end of each step, or nowhere in
    particular. Raises `DataError` where it cannot be encoded.
    """
    if isinstance(reading, RewardReading):
        ids = encode_chat(tokenizer, chat, mask_from=len(chat) - 1).input_ids
        return ids, [0] * len(ids)
    *prompt, answer = chat
    return encode_steps(tokenizer, prompt, steps_of(answer["content"], reading.step_separator), reading.step_separator)


@torch.inference_mode()
def score_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]) -> list[float]:
    """The score of each chat, each one in a forward pass of its own, so that no other decides its last bits."""
    found, reading = [], reading_of(model)
    for chat in chats:
        ids, ends = (torch.tensor([each], device=model.device) for each in encode_scored(tokenizer, chat, reading))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "step_ends": ends}
        found.append(float(scores(model, batch, reading)[0]))
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


def scored_class(reading: RewardReading | StepsReading) -> Any:
    """The class of transformers that such a model is opened as."""
    return AutoModelForSequenceClassification if isinstance(reading, RewardReading) else AutoModelForTokenClassification


def load_reward_model(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a reward model, in float32, ready for inference.

    Raises `ArtifactError` if the head or anything else would be new, if it gives other scores than its config says (one, where
    that says nothing), if it gives others each time, or if it does not score the fixed prompts as its manifest says.
    """
    reading = reading_in(read_config(folder), str(folder))
    model = load_model(scored_class(reading), folder).to(device).eval()
    require_quiet(model, str(folder))
    tokenizer = load_tokenizer(folder)
    problem = None
    if model.config.num_labels != reading.num_outputs:
        wanted = (
            "one" if reading == PLAIN else f"{reading.num_outputs} by what its config.json says of heads and attributes"
        )
        problem = f"gives {model.config.num_labels} scores, and a reward model gives {wanted}"
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
    if facts.head_type not in (HEAD_TYPE, STEPS_HEAD_TYPE):
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
