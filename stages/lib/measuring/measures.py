"""What is measured of one model on the held-out rows that all of them are measured on.

N: pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stages.lib.formulas.calibration import wins
from stages.lib.measuring.compared_models import Rows, Subject, reading_of_judge
from stages.lib.measuring.perplexity import ScoredRow, bits_per_byte, reward_rows, score, score_rows


def num_weights(model: PreTrainedModel) -> int:
    """The number of weights, tied ones once, without the scales (`weight_scale`, ...) that quantization adds beside them."""
    named = ((name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters())
    return sum(parameter.numel() for name, parameter in named if not name.startswith("weight_"))


def language_model_measures(model: PreTrainedModel, subject: Subject, rows: Rows, batch_size: int) -> dict[str, float]:
    """What there are rows for: of text, of what the assistant says, of pairs."""
    measures: dict[str, float] = {}
    if subject.text:
        text = score(model, subject.text, batch_size)
        measures["heldout_perplexity"] = text.perplexity
        measures["heldout_bits_per_byte"] = bits_per_byte(text, subject.text_tokens, rows.text_bytes)
    if subject.chats:
        chats = score(model, subject.chats, batch_size)
        measures["heldout_assistant_loss"] = chats.loss
        # Every token of what the assistant says is predicted, so nothing stands for anything else here.
        measures["heldout_assistant_bits_per_byte"] = bits_per_byte(chats, chats.tokens, rows.chat_bytes)
    if subject.pairs:
        measures |= preference_measures(model, subject.pairs, batch_size)
    return measures


def preference_measures(
    model: PreTrainedModel, pairs: Sequence[tuple[ScoredRow, ScoredRow]], batch_size: int
) -> dict[str, float]:
    """How often the model gives the chosen answer the higher log-probability, as a sum and per token; ties count half."""
    scores = score_rows(model, [row for pair in pairs for row in pair], batch_size)
    sums_N2 = -torch.tensor([each.nats for each in scores], dtype=torch.float64).view(-1, 2)
    tokens_N2 = torch.tensor([each.tokens for each in scores], dtype=torch.float64).view(-1, 2)
    means_N2 = sums_N2 / tokens_N2
    return {
        "heldout_preference_accuracy": float(wins(*sums_N2.unbind(1)).mean()),
        "heldout_preference_accuracy_per_token": float(wins(*means_N2.unbind(1)).mean()),
        "heldout_preference_margin_per_token": float((means_N2[:, 0] - means_N2[:, 1]).mean()),
    }


def reward_model_measures(
    model: PreTrainedModel, subject: Subject, batch_size: int, padding_id: int
) -> dict[str, float]:
    """How often a reward model gives the chosen answer the higher score, ties counted half, and by how much; if there are pairs."""
    if not subject.pairs:
        return {}
    values = reward_rows(
        model, [row for pair in subject.pairs for row in pair], batch_size, padding_id, reading_of_judge(subject)
    )
    scores_N2 = torch.tensor(values, dtype=torch.float64).view(-1, 2)
    return {
        "heldout_reward_accuracy": float(wins(*scores_N2.unbind(1)).mean()),
        "heldout_reward_margin": float((scores_N2[:, 0] - scores_N2[:, 1]).mean()),
    }


def side_by_side(everyone: Sequence[Subject]) -> dict[str, float]:
    """`measure.model` -> number, the same measure of all models next to each other."""
    measures = dict.fromkeys(measure for each in everyone for measure in each.results["measures"])
    return {
        f"{measure}.{each.name}": each.results["measures"][measure]
        for measure in measures
        for each in everyone
        if measure in each.results["measures"]
    }
