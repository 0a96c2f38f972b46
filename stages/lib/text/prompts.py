"""Prompts as tokens: what a policy is asked to complete, from prompts, chats, preference pairs or texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.rows.canonical import Row, format_of_row, read_rows
from stages.lib.rows.ledger import Ledger
from stages.lib.text.chat_fitting import split_last_answer, why_of, with_why
from stages.lib.text.chat_spans import encode_prompt
from stages.lib.text.chat_template import Prompt, UnfitChat
from stages.lib.text.tokenized_parts import TokenizedRow, TokenizedRows, Tokenizing, tokenize_input
from stages.lib.text.tokenizers import encode_texts

Rendering = Literal["chat", "raw"]


TOO_LONG = "prompt_too_long"
"""The prompt has more tokens than it may have. It is never cut: the policy would be asked something else."""


NO_QUESTION = "no_user_message"
"""Nothing stands before the assistant's turn."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt: its ids, what they mean, and the row it comes from (number `index` of its file)."""

    index: int
    ids: list[int]
    prompt: Prompt
    row: Row


class Prompts(Sequence[dict[str, Any]]):
    """The prompts of one file that can be used, in its order; as a sequence of rows, for the schedule and its digest."""

    def __init__(self, rows: Sequence[PromptRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {"input_ids": self.rows[index].ids}


def open_prompts(
    ctx: Context,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    max_prompt_tokens: int,
    max_dropped_fraction: float,
) -> tuple[Prompts, Prompts, Ledger]:
    """The input `prompts`: those of training, the held-out ones, and the ledger of both, written to the artifact.

    Raises `DataError` if a larger share than `max_dropped_fraction` cannot be used, or nothing is left on one side.
    """
    how = tokenizing_prompts(tokenizer, rendering, max_prompt_tokens)
    train, heldout, ledger = tokenize_input(ctx, "prompts", how, max_dropped_fraction)
    folder = ctx.inputs["prompts"]
    return (
        Prompts(prompt_rows(folder / "train.jsonl", train, rendering)),
        Prompts(prompt_rows(folder / "heldout.jsonl", heldout, rendering)),
        ledger,
    )


def tokenizing_prompts(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, max_prompt_tokens: int) -> Tokenizing:
    """Prompts of at most `max_prompt_tokens`."""

    def make(row: Row) -> TokenizedRow:
        prompt = prompt_of(row, rendering)
        example = prompt if isinstance(prompt, str) else " | ".join(message["content"] for message in prompt)
        if not prompt:
            return TokenizedRow(reason=NO_QUESTION, example=example)
        try:
            ids = encode_prompt_or_text(tokenizer, prompt)
        except UnfitChat as error:
            return TokenizedRow(reason=error.reason, example=with_why(why_of(error), example))
        if len(ids) > max_prompt_tokens:
            return TokenizedRow(reason=TOO_LONG, example=example)
        # Nothing of it is what the policy says.
        return TokenizedRow([(ids, [0] * len(ids))])

    return Tokenizing("prompts", tokenizer, make, "max_prompt_tokens", [rendering, max_prompt_tokens])


def prompt_rows(path: Path, tokenized: TokenizedRows, rendering: Rendering) -> list[PromptRow]:
    """The prompts, each with the row of `path` that it comes from."""
    ids = {int(number): tokenized.sequences(index)[0][0] for index, number in enumerate(tokenized.numbers)}
    return [
        PromptRow(number, ids[number].tolist(), prompt_of(row, rendering), row)
        for number, row in enumerate(read_rows(path))
        if number in ids
    ]


def prompt_of(row: Row, rendering: Rendering) -> Prompt:
    """What the policy is asked: the text itself, or the conversation up to where the assistant is to speak: at its end where
    the user speaks last, else where the assistant spoke last.

    Empty where no user asks anything.
    """
    match format_of_row(row), rendering:
        case "text", "raw":
            return str(row["text"])
        case "text", "chat":
            return [{"role": "user", "content": row["text"]}]
        case "prompts" | "preferences" | "unpaired_preferences" | "ratings" | "step_labels", "chat":
            return list(row["prompt"])
        case "chats", "chat":
            asks_last = row["messages"][-1]["role"] != "assistant"
            asked = list(row["messages"]) if asks_last else split_last_answer(row["messages"])[0]
            return asked if any(message["role"] == "user" for message in asked) else []
        case format, _:
            raise DataError(
                Problem("params.rendering", f"is raw, and the prompts are {format}", "Write chat, or give texts.")
            )


def encode_prompt_or_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids that the policy continues: of a text with the token that begins one, if the tokenizer has such a token."""
    if not isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt, strict=True)
    (ids,) = encode_texts(tokenizer, [prompt])
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
