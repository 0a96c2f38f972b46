"""Replies of a causal model: one token by token, or many at once.

B: replies of a batch, T: tokens of their prompts, padded on the left, K: tokens that each reply may have.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.errors import DataError, Problem
from stages.lib.formulas.seeds import TORCH_BITS, bounded_seed
from stages.lib.generating.sampling import DrawByUniforms, continuations, uniforms_for
from stages.lib.text.chat_rendering import Messages
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.tokenizers import stop_token_ids as usual_stop_token_ids

REPLACEMENT = "\ufffd"
"""What decoding puts in place of bytes that are no UTF-8: at the end of a text, a character not yet complete."""


@dataclass(frozen=True)
class Reply:
    """A whole reply. `truncated`: it was cut off at the limit, before the model ended its turn."""

    text: str
    num_tokens: int
    truncated: bool


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a turn: those of the model's generation config, else what the tokenizer's template shows."""
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stops is None:
        stops = usual_stop_token_ids(tokenizer)
    return frozenset([stops] if isinstance(stops, int) else stops)


def context_length_tokens(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model has positions for; None if its config sets no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generator[str, None, Reply]:
    """The assistant's next turn, piece by piece, in whole characters; at its end the generator returns it as a whole.

    Temperature 0 takes the likeliest token; above, tokens are drawn from the smallest set that holds `top_p` of the
    probability (Holtzman et al., 2020). Raises `DataError` if the conversation leaves no room in the model's context.
    """
    tokens = stream_tokens(
        model,
        encode_prompt(tokenizer, messages),
        stop_token_ids(model, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    decoder = IncrementalDecoder(tokenizer)
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            stopped = bool(end.value)
            break
        if piece := decoder.add(token):
            yield piece
    if piece := decoder.rest():
        yield piece
    return Reply(decoder.given, len(decoder.ids), truncated=not stopped)


def whole_reply(stream: Generator[str, None, Reply]) -> Reply:
    """What `stream_reply` returns once all pieces have come."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            result: Reply = end.value
            return result


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

    Temperature 0 writes what `stream_reply` writes. Above, the random numbers of a reply are a function of the seed and
    of its position: what stands in a batch together decides nothing but the last bits of the probabilities. Raises
    `DataError` if a conversation leaves no room for `max_new_tokens` in the model's context.
    """
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    limit = context_length_tokens(model)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            Problem(
                "conversation",
                f"is {longest:,} tokens long, and the model reads {limit:,} with the {max_new_tokens:,} of the reply",
                "Leave it out, or lower max_new_tokens.",
            )
        )
    stops = stop_token_ids(model, tokenizer)
    replies: dict[int, Reply] = {}
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        uniforms_BK = np.stack([uniforms_for(seed, positions[index], max_new_tokens) for index in batch])
        written = write_tokens(
            model,
            [prompts[index] for index in batch],
            uniforms_BK,
            stops,
            tokenizer.pad_token_id or 0,
            temperature,
            top_p,
        )
        for index, ids in zip(batch, written, strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            decoder = IncrementalDecoder(tokenizer)
            for token in ids[:end]:
                decoder.add(token)
            decoder.rest()
            replies[index] = Reply(decoder.given, end, truncated=end == len(ids))
    return [replies[index] for index in range(len(prompts))]


@torch.inference_mode()
def write_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BK: NDArray[np.float64],
    stops: frozenset[int],
    padding_id: int,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """The ids that follow each prompt, at most K: after a stop id, which is among them, nothing more counts."""
    processors: list[LogitsProcessor] = []
    if temperature > 0:
        # With what is left out at probability 0, the drawing leaves one token to choose: greedy decoding then samples.
        processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(DrawByUniforms(uniforms_BK, max(map(len, prompts)), temperature=1.0))
    written: list[list[int]] = continuations(
        model, prompts, uniforms_BK.shape[1], processors, stop_ids=stops, padding_id=padding_id
    ).tolist()
    return written


@torch.inference_mode()
def next_token(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The token to go on with, from the logits of the last position."""
    if temperature == 0:
        return int(logits_V.argmax())
    scores_1V = (logits_V.float() / temperature).unsqueeze(0)
    if top_p < 1:
        scores_1V = TopPLogitsWarper(top_p)(torch.empty(1, 0, dtype=torch.long), scores_1V)
    # Drawn on the CPU: one generator gives the same numbers on every device.
    probabilities_V = scores_1V.softmax(-1)[0].cpu()
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def stream_tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    stops: frozenset[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Generator[int, None, bool]:
    """The ids that follow `prompt`, without the stop id. The generator returns whether a stop id ended it."""
    limit = context_length_tokens(model)
    if limit is not None and len(prompt) >= limit:
        raise DataError(
            Problem(
                "conversation",
                f"is {len(prompt):,} tokens long, and the model reads {limit:,} in all",
                "Start a new one, or shorten it.",
            )
        )
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    generator = torch.Generator().manual_seed(bounded_seed(seed, TORCH_BITS))
    cache = None
    ids = list(prompt)
    for _ in range(room):
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([ids], device=model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = output.past_key_values
        token = next_token(output.logits[0, -1], temperature, top_p, generator)
        if token in stops:
            return True
        yield token
        ids = [token]
    return False


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
