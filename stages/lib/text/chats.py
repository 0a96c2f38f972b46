"""Chats as tokens: what the model reads, and which of it the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.lib.formulas.token_losses import TARGETS, Tensors, next_tokens
from stages.lib.rows.canonical import Row
from stages.lib.text.batches import Collate, attention_mask, padded
from stages.lib.text.chat_fitting import fit_chat, with_why
from stages.lib.text.chat_rendering import is_learned
from stages.lib.text.chat_spans import Thinking
from stages.lib.text.chat_thoughts import is_unopened
from stages.lib.text.tokenized_parts import SHORTENED, TokenizedRow, TokenizedRows, Tokenizing


class Chats(Sequence[dict[str, Any]]):
    """Tokenized chats: `input_ids`, and `said`, 1 for each token that the assistant says."""

    def __init__(self, tokenized: TokenizedRows) -> None:
        self.tokenized = tokenized

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        ((ids, said),) = self.tokenized.sequences(index)
        return {"input_ids": ids, "said": said}

    @property
    def num_tokens(self) -> int:
        return int(self.tokenized.lengths.sum())

    def share_ending_with(self, stop_ids: Sequence[int]) -> float:
        """How many of the chats ask for a stop token as the last thing the assistant says, as a fraction."""
        ends = 0
        for row in self:
            ends += int(row["input_ids"][np.flatnonzero(row["said"])[-1]]) in stop_ids
        return ends / len(self)


def through_last_answer(messages: Sequence[Row]) -> Sequence[Row]:
    """The chat without a last question, or a last call of tools, that nobody answers."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: last + 1]


APART = "one_sequence_per_answer"
"""Chats whose answers do not share a sequence, because the template rewrites earlier turns or a token crosses a border."""

LOST = "answers_too_long"
"""Answers that are not learned, because their own sequence is too long."""

TRIMMED = "answers_trimmed_by_template"
"""Answers off whose ends the template takes spaces or line breaks."""


UNOPENED = "thoughts_without_opening_mark"
"""Answers that say the end of a thought and not its beginning: what stands before it is trained, masked or stripped as the
thought."""

UNANSWERED = "unanswered_ends_left_out"
"""Chats that end in a question, or in a call of tools, that nobody answers: nothing learned would read it."""


def tokenizing_chats(
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    limit: str = "max_length_tokens",
    thinking: Thinking = "trained",
) -> Tokenizing:
    """Chats in at most `max_length_tokens` each, which is what the param `limit` says: longer ones lose their oldest turns."""

    def make(row: Row) -> TokenizedRow | list[TokenizedRow]:
        answered = through_last_answer(row["messages"])
        fitted = fit_chat(tokenizer, answered, max_length_tokens, thinking)
        if not fitted.sequences:
            example = " | ".join(message["content"] for message in row["messages"])
            return TokenizedRow(reason=fitted.reason, example=with_why(fitted.why, example))
        counts = {
            SHORTENED: int(fitted.dropped_messages > 0),
            APART: int(len(fitted.sequences) + fitted.lost_answers > 1),
            LOST: fitted.lost_answers,
            TRIMMED: fitted.trimmed_answers,
            UNOPENED: sum(map(is_unopened, filter(is_learned, row["messages"]))),
            UNANSWERED: int(len(answered) < len(row["messages"])),
        }
        repaired = {name: count for name, count in counts.items() if count}
        first, *rest = fitted.sequences
        return [TokenizedRow([first], repaired=repaired), *(TokenizedRow([each]) for each in rest)]

    return Tokenizing("chats", tokenizer, make, limit, [max_length_tokens, thinking])


def collate_chats(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and targets: the next token, where the assistant says it.

    Padded on the right. What is padding is told by position: the id that fills it may well occur in the chats.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        ids = [row["input_ids"] for row in rows]
        ids_BT = padded(ids, padding_id)
        said_BT = padded([row["said"] for row in rows])
        return {"input_ids": ids_BT, "attention_mask": attention_mask(ids), TARGETS: next_tokens(ids_BT, said_BT)}

    return collate
