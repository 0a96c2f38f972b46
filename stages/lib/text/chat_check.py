"""Whether a chat template is fit for training on the assistant's turns, tried before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_rendering import Messages, special_ids, special_tokens
from stages.lib.text.chat_spans import encode_chat, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends an assistant's turn in this template, as the template itself shows it. None without template."""
    if not tokenizer.chat_template:
        return None
    try:
        ids, mask = encode_chat(tokenizer, PROBES[0])
    except DataError:
        return None
    return max((position, token) for position, (token, said) in enumerate(zip(ids, mask, strict=True)) if said)[1]


PROBES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": " two  three"},
        {"role": "user", "content": "\n\tfour\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "f(x)"},
        {"role": "assistant", "content": "```python\nreturn 1\n```\n"},
    ],
]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises `DataError` with all that makes the template unfit for training on the assistant's turns.

    Tried on a single-turn and a multi-turn chat: the prompt of each answer must be an exact prefix, in tokens, of the
    training sequence; each turn must end in a special token; bos stands once at the start or not at all; and a message
    that spells special tokens must not produce them.
    """
    problems = []
    for messages in PROBES:
        try:
            problems += template_problems(tokenizer, messages, where)
        except DataError as error:
            problems += [p if isinstance(p, Problem) else Problem(where, p) for p in error.problems]
    if problems:
        raise DataError(*dict.fromkeys(problems))


def template_problems(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> list[Problem]:
    problems = []
    ids, mask = encode_chat(tokenizer, messages)
    starts = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
    ends = [i for i in range(len(ids)) if mask[i] and not (i + 1 < len(ids) and mask[i + 1])]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(starts) != len(turns):
        problems.append(
            Problem(where, f"marks {len(starts)} assistant turns of {len(turns)}", "Mark each one by itself.")
        )
    for index, start in zip(turns, starts, strict=False):
        if encode_prompt(tokenizer, messages[:index]) != ids[:start]:
            problems.append(
                Problem(
                    where,
                    f"the prompt for message {index + 1} is not how the training sequence begins",
                    "What add_generation_prompt writes must be what stands before a {% generation %} block.",
                )
            )
    special = special_ids(tokenizer)
    if any(ids[end] not in special for end in ends):
        problems.append(
            Problem(
                where,
                "does not end each assistant turn with a special token",
                "Write one at the end of the generation block.",
            )
        )
    if (bos := tokenizer.bos_token_id) is not None and bos in ids[1:] and tokenizer.bos_token != tokenizer.eos_token:
        problems.append(Problem(where, f"writes {tokenizer.bos_token} elsewhere than at the start", "Write it once."))
    spelled = "".join(token.content for token in special_tokens(tokenizer))
    hostile = [{**message, "content": message["content"] + spelled} for message in messages]
    if [i for i in encode_chat(tokenizer, hostile).input_ids if i in special] != [i for i in ids if i in special]:
        problems.append(Problem(where, "lets messages that spell special tokens produce them", "This must not be."))
    return problems
