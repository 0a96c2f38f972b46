"""New heads on trained bodies: a score per sequence, labels, tags, values. Only the head may be new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pipeline.errors import ArtifactError, Problem
from pipeline.store.artifact import REWARD_READING
from stages.lib.models.config import read_config
from stages.lib.models.loading import load_model, read_weights, without_dropout


def add_reward_head(
    folder: Path,
    padding_id: int,
    *,
    num_outputs: int = 1,
    of_tokens: bool = False,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal model in `folder` as a model with one score per sequence, or with so many; or `of_tokens`, per token. Only the
    head is new, and random. `config` is written into the model's config.

    Raises `ArtifactError` if anything else of the model is not in the folder, or no such model exists for its type.
    """
    auto_class = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model, report = with_new_head(auto_class, folder, num_labels=num_outputs)
    holes = sorted(name for name in report["missing_keys"] if is_body(model, name))
    holes += [str(key) for key in report.get("mismatched_keys", ())]
    left_over = sorted(name for name in report["unexpected_keys"] if is_body(model, name))
    if holes or left_over:
        what = (
            f"does not hold the weights {', '.join(holes[:3])}"
            if holes
            else f"has no use for {', '.join(left_over[:3])}"
        )
        raise ArtifactError(
            Problem(str(folder), f"its body would not be loaded whole: it {what}", "Name a causal model.")
        )
    model.config.num_labels = num_outputs
    if of_tokens and getattr(model.config, "classifier_dropout", None) is None:
        # Else transformers drops a tenth of what the head reads, which nobody asked for, and no other head here does.
        model.config.classifier_dropout = 0.0
        if isinstance(getattr(model, "dropout", None), nn.Dropout):
            model.dropout.p = 0.0
    for name, value in (config or {}).items():
        setattr(model.config, name, value)
    set_padding(model, padding_id)
    return model


def with_new_head(auto_class: Any, folder: Path, **config: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The body in `folder` under a head of `auto_class`, in float32, and which weights are new; `config` goes to its config.

    Raises `ArtifactError` if transformers has no such class for its type.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of the head's weights, in the words of a warning
    try:
        return read_weights(auto_class, folder, dtype=torch.float32, **config)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        kind, wanted = read_config(folder).get("model_type"), auto_class.__name__.removeprefix("AutoModelFor")
        what = f"transformers has no model for {wanted} of the type {kind}"
        raise ArtifactError(Problem(str(folder), what, "Choose another architecture.")) from None
    finally:
        logging.set_verbosity(level)


def is_body(model: PreTrainedModel, name: str) -> bool:
    return name.startswith(f"{model.base_model_prefix}.")


def set_padding(model: PreTrainedModel, padding_id: int) -> None:
    model.config.pad_token_id = padding_id
    model.config.get_text_config().pad_token_id = padding_id


def choose_padding(tokenizer: PreTrainedTokenizerBase, last_ids: set[int]) -> int:
    """The id to pad with: the tokenizer's own, or if it has none or texts end with it, another that no text ends with.

    The tokenizer is told, so that it is published with the model. Raises `ArtifactError` if no special token is free.
    """
    free = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index not in last_ids
    }
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *sorted(free)):
        if token in free:
            tokenizer.pad_token = token
            return free[token]
    raise ArtifactError(
        Problem(
            "tokenizer",
            "has no special token to pad with: chats end with every one of them",
            "Add a pad token to the tokenizer.",
        )
    )


def add_head(auto_class: Any, encoder: Path, **config: Any) -> PreTrainedModel:
    """The encoder's body under the new, random head of `auto_class`, in float32; `config` goes to the model's config.

    Only the head (and a pooler, which the masked objective does not train) may be new. Raises `ArtifactError` if
    weights of the body are missing.
    """
    model, report = with_new_head(auto_class, encoder, **config)
    holes = sorted(name for name in report["missing_keys"] if is_body(model, name) and ".pooler." not in name)
    holes += sorted(str(key) for key in report.get("mismatched_keys", ()))
    if holes:
        raise ArtifactError(
            Problem(str(encoder), f"does not hold the weights {', '.join(holes[:3])}", "Name a trained encoder.")
        )
    return model


# Policy and critic from disk


def load_policy(folder: Path) -> PreTrainedModel:
    """The causal model in `folder`, without dropout: the ratio of a policy to itself must be 1."""
    return without_dropout(load_model(AutoModelForCausalLM, folder))


def load_value(folder: Path) -> PreTrainedModel:
    """The critic in `folder`: a model with one score. Raises `ArtifactError` if it has several, or its head cannot be put on
    every token.
    """
    model = scoring_model(folder)
    if model.config.num_labels != 1:
        what = f"gives {model.config.num_labels} scores, and a critic gives one"
        raise ArtifactError(Problem(str(folder), what, "Name a critic that ppo made, or leave the input out."))
    return model


def scoring_model(folder: Path) -> PreTrainedModel:
    """The model in `folder` with its scores. Raises `ArtifactError` if its head cannot be put on every token."""
    model = without_dropout(load_model(AutoModelForSequenceClassification, folder))
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ArtifactError(
            Problem(
                str(folder),
                f"{type(model).__name__} has no linear head named score, which a critic puts on every token",
                "Choose another architecture.",
            )
        )
    return model


def fresh_value(folder: Path, padding_id: int, *, is_reward_model: bool) -> PreTrainedModel:
    """A critic on the backbone in `folder` with a head of zeros: it says 0 until it knows better (Huang et al., 2024).

    Of a reward model of several heads or attributes the backbone alone is taken, under a head with one output.
    """
    model = scoring_model(folder) if is_reward_model else add_reward_head(folder, padding_id)
    if model.config.num_labels != 1:
        model.score = nn.Linear(model.score.in_features, 1, bias=model.score.bias is not None)
        model.num_labels = model.config.num_labels = 1
    vars(model.config).pop(REWARD_READING, None)
    nn.init.zeros_(model.score.weight)
    if getattr(model.score, "bias", None) is not None:
        nn.init.zeros_(model.score.bias)
    return model
