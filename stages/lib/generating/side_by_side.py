"""What a model says under each of its adapters, and alone: replies to one conversation, in one batch where that can be."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from stages.lib.generating.replies import Reply, prompt_and_room, reply_of, stop_ids_of, write_reply
from stages.lib.generating.sampling import sample, uniforms_for
from stages.lib.models.adapters.opening import Adapted
from stages.lib.models.adapters.rows import all_on, standing_together
from stages.lib.text.chat_template import Messages


@dataclass(frozen=True)
class SameForAll:
    """How the replies are drawn, as in `write_reply`."""

    position: int = 0
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def replies_of_all(adapted: Adapted, messages: Messages, drawn: SameForAll) -> dict[str | None, Reply | DataError]:
    """Name of an adapter, or None for the model alone -> what it answers next, or why it cannot.

    Each answers in its own template what `write_reply` writes under it. LoRAs and the model alone share a batch where they stop
    at the same tokens and have the same room; others are put on one after another. What was on the model is on it afterwards.
    """
    before, together = adapted.active, [*standing_together(adapted), None]
    said: dict[str | None, Reply | DataError] = {}
    batches: dict[tuple[frozenset[int], int], dict[str | None, list[int]]] = defaultdict(dict)
    try:
        for name in (*adapted.adapters, None):
            model, tokenizer = adapted.use(name), adapted.tokenizers[name]
            try:
                if name in together and len(together) > 1:
                    prompt, room = prompt_and_room(model, tokenizer, messages, drawn.max_new_tokens)
                    batches[stop_ids_of(model, tokenizer), room][name] = prompt
                else:
                    said[name] = write_reply(model, tokenizer, messages, **vars(drawn))
            except DataError as error:
                said[name] = error
        for (stops, room), prompts in batches.items():
            if len(prompts) > 1:
                said |= written_together(adapted, prompts, stops, room, drawn)
                continue
            (name,) = prompts  # which shares a batch with none
            said[name] = write_reply(adapted.use(name), adapted.tokenizers[name], messages, **vars(drawn))
    finally:
        adapted.use(before)
    return {name: said[name] for name in (*adapted.adapters, None)}


def written_together(
    adapted: Adapted, prompts: dict[str | None, list[int]], stops: frozenset[int], room: int, drawn: SameForAll
) -> dict[str | None, Reply]:
    """One batch: a row under each of the names, with the same random numbers."""
    numbers_1K = uniforms_for(drawn.seed, drawn.position, room)[None]
    with all_on(adapted, [name for name in prompts if name is not None]) as (model, called):
        written = sample(
            model,
            list(prompts.values()),
            np.repeat(numbers_1K, len(prompts), axis=0),
            stop_ids=stops,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            adapter_names=[called[name] for name in prompts],
        )
    return {name: reply_of(each, adapted.tokenizers[name]) for name, each in zip(prompts, written, strict=True)}
