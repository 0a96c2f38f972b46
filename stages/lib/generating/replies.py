"""Replies of a causal model in its own chat template: one that is shown as it is written, or many at once.

B: replies of a batch, K: tokens that each reply may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from stages.lib.generating.sampling import Sampled, sample, uniforms_for
from stages.lib.models.adapters.opening import virtual_tokens_of
from stages.lib.models.lengths import longest_text
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.chat_template import Messages
from stages.lib.text.tokenizers import stop_token_ids

REPLACEMENT = "\ufffd"
"""What decoding puts in place of bytes that are no UTF-8: at the end of a text, a character not yet complete."""


@dataclass(frozen=True)
class Reply:
    """A whole reply. `truncated`: it was cut off at the limit, before the model ended its turn."""

    text: str
    num_tokens: int
    truncated: bool


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a turn: those of the model's generation config, else what the tokenizer's template shows."""
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stops is None:
        stops = stop_token_ids(tokenizer)
    return frozenset([stops] if isinstance(stops, int) else stops)


def context_of(model: Any) -> int | None:
    """How many tokens the model reads, besides the virtual ones of an adapter on it; None where its config sets no limit."""
    limit = longest_text(model.config.to_dict())
    return None if limit is None else limit - virtual_tokens_of(model)


def write_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    position: int = 0,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    show: Callable[[str], Any] = lambda piece: None,
) -> Reply:
    """The assistant's next turn. Its pieces, in whole characters, are given to `show` as they come.

    What `write_replies` writes with the same seed and position, but for where the conversation leaves less room than
    `max_new_tokens` in the model's context: then it ends there. Raises `DataError` if none is left.
    """
    prompt, room = prompt_and_room(model, tokenizer, messages, max_new_tokens)
    stops = stop_ids_of(model, tokenizer)
    decoder = IncrementalDecoder(tokenizer)

    def add(token: int) -> None:
        if token not in stops and (piece := decoder.add(token)):
            show(piece)

    numbers_1K = uniforms_for(seed, position, room)[None]
    (written,) = sample(model, [prompt], numbers_1K, stop_ids=stops, temperature=temperature, top_p=top_p, on_token=add)
    if piece := decoder.rest():
        show(piece)
    return Reply(decoder.given, len(decoder.ids), truncated=not written.ended)


def prompt_and_room(
    model: Any, tokenizer: PreTrainedTokenizerBase, messages: Messages, max_new_tokens: int
) -> tuple[list[int], int]:
    """The ids that the assistant's next turn follows, and how many tokens it may have. Raises `DataError` if that is none."""
    prompt = list(encode_prompt(tokenizer, messages))
    limit = context_of(model)
    if limit is not None and len(prompt) >= limit:
        raise DataError(
            Problem(
                "conversation",
                f"is {len(prompt):,} tokens long, and the model reads {limit:,} in all",
                "Start a new one, or shorten it.",
            )
        )
    return prompt, max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def write_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    positions: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> list[Reply]:
    """The assistant's next turn in each conversation, `batch_size` of them at a time.

    The random numbers of a reply are a function of the seed and of its position: what stands in a batch together decides
    nothing but the last bits of the probabilities. Raises `DataError` if a conversation leaves no room for
    `max_new_tokens` in the model's context.
    """
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    limit = context_of(model)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            Problem(
                "conversation",
                f"is {longest:,} tokens long, and the model reads {limit:,} with the {max_new_tokens:,} of the reply",
                "Leave it out, or lower max_new_tokens.",
            )
        )
    stops = stop_ids_of(model, tokenizer)
    replies: dict[int, Reply] = {}
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        uniforms_BK = np.stack([uniforms_for(seed, positions[index], max_new_tokens) for index in batch])
        chosen = [prompts[index] for index in batch]
        written = sample(model, chosen, uniforms_BK, stop_ids=stops, temperature=temperature, top_p=top_p)
        replies |= {index: reply_of(each, tokenizer) for index, each in zip(batch, written, strict=True)}
    return [replies[index] for index in range(len(prompts))]


def reply_of(written: Sampled, tokenizer: PreTrainedTokenizerBase) -> Reply:
    """The reply that the tokens spell, without the one that ends it."""
    ids = written.ids[:-1] if written.ended else written.ids
    decoder = IncrementalDecoder(tokenizer)
    for token in ids.tolist():
        decoder.add(token)
    decoder.rest()
    return Reply(decoder.given, len(ids), truncated=not written.ended)


class IncrementalDecoder:
    """Turns ids into text as they come: characters are never split, and what was given out is never taken back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = ""
        self.before = 0
        """Where decoding starts: some ids before those not yet given out, because spaces depend on what precedes."""
        self.after = 0
        """How many ids have been given out."""

    def decoded(self, end: int | None = None) -> str:
        text = self.tokenizer.decode(
            self.ids[self.before : end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def add(self, token: int) -> str:
        """The text that `token` completes: nothing while a character still lacks bytes."""
        self.ids.append(token)
        text = self.decoded()
        return "" if text.endswith(REPLACEMENT) else self.give(text)

    def rest(self) -> str:
        """What is left when no more tokens come: bytes that never became a character, as replacement characters."""
        return self.give(self.decoded())

    def give(self, text: str) -> str:
        piece = text[len(self.decoded(self.after)) :]
        if piece:
            self.before, self.after = self.after, len(self.ids)
            self.given += piece
        return piece
