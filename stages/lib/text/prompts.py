"""Prompts as tokens: what a policy is asked to complete, from chats, preference pairs or texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.processes.collectives import from_all
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import Row, format_of_row, read_rows
from stages.lib.rows.ledger import Ledger
from stages.lib.text.chat_fitting import split_last_answer
from stages.lib.text.chat_rendering import Prompt
from stages.lib.text.chat_spans import encode_prompt
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
    join_processes(ctx)
    ledger = Ledger()
    sides = []
    for split in ("train", "heldout"):
        rows = list(read_rows(ctx.inputs["prompts"] / f"{split}.jsonl"))
        mine = range(ctx.world.rank, len(rows), ctx.world.size)
        found = [prompt_row(index, rows[index], tokenizer, rendering, max_prompt_tokens) for index in mine]
        everything = sorted((each for part in from_all(found) for each in part), key=lambda each: each[0])
        for _, usable, reason, example in everything:
            ledger.read += 1
            if usable is None:
                ledger.drop(reason, example)
        usable_rows = [usable for _, usable, _, _ in everything if usable is not None]
        ledger.kept += len(usable_rows)
        sides.append(Prompts(usable_rows))
    require_prompts(sides, ledger, max_dropped_fraction)
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items())) or "none"
    ctx.journal.note(f"{len(sides[0]):,} training and {len(sides[1]):,} held-out prompts; dropped: {said}")
    if ctx.world.is_main:
        ledger.write(ctx.out)
    return sides[0], sides[1], ledger


def require_prompts(sides: Sequence[Prompts], ledger: Ledger, max_dropped_fraction: float) -> None:
    for split, prompts in zip(("training", "held-out"), sides, strict=True):
        if not len(prompts):
            raise DataError(
                Problem(
                    "inputs.prompts",
                    f"has no {split} prompt that can be used: {dict(ledger.dropped)}",
                    "Raise max_prompt_tokens, or look at the rows.",
                )
            )
    share = 1 - ledger.kept / ledger.read
    if share > max_dropped_fraction:
        raise DataError(
            Problem(
                "inputs.prompts",
                f"{share:.0%} of the prompts cannot be used: {dict(ledger.dropped)}",
                "Raise max_prompt_tokens, clean the rows, or allow it with max_dropped_fraction.",
            )
        )


def prompt_row(
    index: int, row: Row, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, max_prompt_tokens: int
) -> tuple[int, PromptRow | None, str, str]:
    """(index, the prompt, "", ""), or (index, None, the reason, an example)."""
    prompt = prompt_of(row, rendering)
    example = (prompt if isinstance(prompt, str) else " | ".join(m["content"] for m in prompt))[:200]
    if not prompt:
        return index, None, NO_QUESTION, example
    ids = encode(tokenizer, prompt)
    if len(ids) > max_prompt_tokens:
        return index, None, TOO_LONG, example
    return index, PromptRow(index, ids, prompt, row), "", ""


def prompt_of(row: Row, rendering: Rendering) -> Prompt:
    """What the policy is asked: the text itself, or the conversation up to where the assistant speaks last.

    Empty where no user asks anything.
    """
    match format_of_row(row), rendering:
        case "text", "raw":
            return str(row["text"])
        case "text", "chat":
            return [{"role": "user", "content": row["text"]}]
        case "preferences", "chat":
            return list(row["prompt"])
        case "chats", "chat":
            asked, _ = split_last_answer(row["messages"])
            return asked if any(message["role"] == "user" for message in asked) else []
        case format, _:
            raise DataError(
                Problem("params.rendering", f"is raw, and the prompts are {format}", "Write chat, or give texts.")
            )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids that the policy continues: of a text with the token that begins one, if the tokenizer has such a token."""
    if not isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt)
    (ids,) = encode_texts(tokenizer, [prompt])
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def location(path: Path, row: PromptRow) -> str:
    """Where the row stands, for messages."""
    return f"{path}: row {row.index + 1}"
