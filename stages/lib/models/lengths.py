"""Whether what a recipe asks for is longer than the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.models.arithmetic import field_of
from stages.lib.models.config import read_config

SHIFTED_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"})
"""Model types that number positions from the padding id on, and so take fewer tokens than they have positions."""


def longest_text(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model with this `config.json` takes at once, or None where it sets no limit."""
    positions = config.get("max_position_embeddings")
    if positions is None:
        return None
    padding = config.get("pad_token_id")
    shift = 1 + (1 if padding is None else int(padding)) if config.get("model_type") in SHIFTED_POSITIONS else 0
    return int(positions) - shift


def length_problems(config: Mapping[str, Any], max_length_tokens: int) -> list[Problem]:
    """What is wrong if texts of `max_length_tokens` are longer than the encoder takes."""
    limit = longest_text(config)
    if limit is None or max_length_tokens <= limit:
        return []
    return [
        Problem(
            "params.max_length_tokens",
            f"is {max_length_tokens}, and the encoder takes {limit} tokens",
            f"Lower it to {limit}, or train an encoder with more positions.",
        )
    ]


def position_problems(architecture: Mapping[str, Any], max_length_tokens: int) -> list[Problem]:
    """What is wrong if sequences are longer than the model has positions."""
    positions = field_of(architecture, "max_position_embeddings")
    if positions is None or max_length_tokens <= positions:
        return []
    return [
        Problem(
            "params.max_length_tokens",
            f"is {max_length_tokens}, and the model has {positions} positions",
            f"Lower it to {positions}.",
        )
    ]


def require_positions(architecture: Mapping[str, Any], max_length_tokens: int) -> None:
    """Raises `DataError` if sequences are longer than the model has positions."""
    if problems := position_problems(architecture, max_length_tokens):
        raise DataError(*problems)


def require_length(encoder: Path, max_length_tokens: int) -> None:
    """Raises `DataError` if texts of `max_length_tokens` are longer than the encoder takes."""
    problems = length_problems(read_config(encoder), max_length_tokens)
    if problems:
        raise DataError(*problems)
