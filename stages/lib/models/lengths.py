"""How many tokens a model takes at once, and what is wrong if it is asked for more. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.models.arithmetic import field_of
from stages.lib.models.config import text_config

SHIFTED_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"})
"""Model types that number positions from behind the padding id, and so take fewer tokens than they have positions."""


def first_position(config: Mapping[str, Any]) -> int:
    """The position id of a text's first token: some models count from behind the padding id."""
    inner = text_config(config)
    if inner.get("model_type") not in SHIFTED_POSITIONS:
        return 0
    padding = inner.get("pad_token_id")
    return 1 + (1 if padding is None else int(padding))


def longest_text(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model with this `config.json` takes at once, or None where it sets no limit."""
    positions = field_of(text_config(config), "max_position_embeddings")
    return None if positions is None else int(positions) - first_position(config)


def length_problems(
    config: Mapping[str, Any],
    num_tokens: int | None,
    *,
    where: str = "params.max_length_tokens",
    what: str = "is {tokens}",
    hint: str = "Lower it to {limit}.",
) -> list[Problem]:
    """What is wrong if the model takes fewer than `num_tokens` at once: one problem or none.

    `what` says of the place `where` how many tokens it asks for. It and the hint may speak of the `tokens` asked for, of
    the model's `limit`, and of how far the one is `above` the other.
    """
    limit = longest_text(config)
    if limit is None or num_tokens is None or num_tokens <= limit:
        return []
    numbers = {"tokens": num_tokens, "limit": limit, "above": num_tokens - limit}
    return [Problem(where, f"{what}, and the model takes {{limit}} tokens".format(**numbers), hint.format(**numbers))]


def require_length(config: Mapping[str, Any], num_tokens: int, **said: str) -> None:
    """Raises `DataError` with what `length_problems` finds."""
    if problems := length_problems(config, num_tokens, **said):
        raise DataError(*problems)
