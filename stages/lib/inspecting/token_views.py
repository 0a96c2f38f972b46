"""Rows as a model reads them: its tokens, and which of them carry loss. All that is asked of tokenizers is asked here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import DataError
from stages.lib.inspecting.row_views import Part, part
from stages.lib.rows.canonical import FORMATS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE_CHAT = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome."},
)


class TokenView(NamedTuple):
    """A row, or a side of one, as tokens."""

    name: str
    ids: list[int]
    carries_loss: list[int]
    """1 for each token that carries loss."""


class ModelView:
    """Looks at rows with the tokenizer in `folder`. Raises `ArtifactError` if there is none."""

    def __init__(self, folder: Path) -> None:
        from transformers.utils import logging as transformers_logging

        from stages.lib.text.tokenizers import load_tokenizer

        transformers_logging.set_verbosity_error()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)

    def views_of(self, row: Row, format: str) -> list[TokenView]:
        """The sequences that stages make of the row. Raises `DataError` where its template cannot render it."""
        match format:
            case "chats":
                return self.chat_views("chat", row["messages"])
            case "prompts":
                return [self.prompt_view(row["prompt"])]
            case "preferences" | "unpaired_preferences" | "ratings":
                asked = len(row["prompt"])
                answers = [side for side in ("chosen", "rejected", "completion") if side in row]
                sides = [(side, [*row["prompt"], *row[side]]) for side in answers]
                return [view for side, messages in sides for view in self.chat_views(side, messages, mask_from=asked)]
            case _:
                return [self.text_view("text", "\n".join(FORMATS[format].texts(row)), learned=format == "text")]

    def chat_views(self, name: str, messages: Sequence[Row], *, mask_from: int = 0) -> list[TokenView]:
        """The sequences from which a chat's answers from message `mask_from` on are learned."""
        from stages.lib.text.chat_rendering import learned_turns
        from stages.lib.text.chat_spans import training_sequences

        last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        # Nothing is learned from what stands after the last answer.
        chat = list(messages[: last + 1])
        sequences = training_sequences(self.tokenizer, chat, learned_turns(chat, mask_from))
        return [TokenView(name, *each.encoded) for each in sequences]

    def prompt_view(self, messages: Sequence[Row]) -> TokenView:
        from stages.lib.text.chat_spans import encode_prompt

        ids = encode_prompt(self.tokenizer, messages)
        return TokenView("prompt", ids, [0] * len(ids))

    def text_view(self, name: str, text: str, *, learned: bool) -> TokenView:
        from stages.lib.text.tokenizers import encode_texts

        (ids,) = encode_texts(self.tokenizer, [text])
        return TokenView(name, ids, [int(learned)] * len(ids))

    def part_of(self, view: TokenView) -> Part:
        """The view as text, stretches of tokens that carry loss marked."""
        from stages.lib.text.tokenizers import decode_ids

        pieces = []
        tokens = zip(view.ids, view.carries_loss, strict=True)
        for learned, stretch in groupby(tokens, key=lambda token: bool(token[1])):
            pieces.append((decode_ids(self.tokenizer, [token for token, _ in stretch]), learned))
        return part(f"{view.name}, {len(view.ids):,} tokens, {sum(view.carries_loss):,} carry loss", *pieces)

    def facts(self) -> dict[str, Any]:
        """What is to be known of the tokenizer and its template, with an example chat."""
        from stages.lib.text.tokenizers import decode_ids, facts_of_tokenizer

        facts = facts_of_tokenizer(self.tokenizer)
        stops = facts.pop("stop_token_ids")
        facts["stop_tokens"] = {str(each): decode_ids(self.tokenizer, [each]) for each in stops}
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            facts["chat_templates"] = sorted(template)
        return facts

    def example(self) -> dict[str, Any]:
        """The example chat as the template renders it, or why it does not."""
        try:
            return {"parts": [self.part_of(view) for view in self.chat_views("example chat", EXAMPLE_CHAT)]}
        except DataError as error:
            return {"problem": str(error)}
