"""Whether a chat template is fit for training on the assistant's turns, tried before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_answers import end_tokens
from stages.lib.text.chat_rendering import special_ids, special_tokens
from stages.lib.text.chat_spans import encode_chat, encode_prompt
from stages.lib.text.chat_template import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an assistant's turn in this template, as the template itself shows it: of an answer, and of calls of
    tools where it knows such. None without template."""
    if not tokenizer.chat_template:
        return []
    ids: list[int] = tokenizer.convert_tokens_to_ids(end_tokens(tokenizer))
    return ids


PROBE = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
"""A single exchange: what is wrong with longer chats is seen, and counted, row by row."""


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises `DataError` with all that makes the template unfit for training on the assistant's turns.

    Tried on one exchange: the prompt of the answer must be an exact prefix, in tokens, of the training sequence; the answer
    must end in a special token; bos does not stand twice at the start; and a message that spells special tokens must not
    produce them.
    """
    try:
        problems = template_problems(tokenizer, where)
    except DataError as error:
        problems = [placed(each, where) for each in error.problems]
    if problems:
        raise DataError(*dict.fromkeys(problems))


def placed(problem: Problem | str, where: str) -> Problem:
    """The problem, said of the place that the template comes from."""
    if isinstance(problem, str):
        return Problem(where, problem)
    return replace(problem, where=where) if problem.where == "chat_template" else problem


def template_problems(tokenizer: PreTrainedTokenizerBase, where: str) -> list[Problem]:
    problems = []
    ids, mask = encode_chat(tokenizer, PROBE)
    if encode_prompt(tokenizer, PROBE[:1]) != ids[: mask.index(1)]:
        what = "the prompt for an answer is not how the training sequence begins"
        problems.append(
            Problem(where, what, "What add_generation_prompt writes must be what stands before the answer.")
        )
    spelled = "".join(token.content for token in special_tokens(tokenizer))
    hostile = [{**message, "content": message["content"] + spelled} for message in PROBE]
    if special_until_said(tokenizer, hostile) != special_until_said(tokenizer, PROBE):
        problems.append(Problem(where, "lets messages that spell special tokens produce them", "This must not be."))
    return problems


def special_until_said(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The special tokens of a chat up to the last that the assistant says. What the template writes behind it is nobody's, and
    is not there where an answer is encoded after its prompt.
    """
    special = special_ids(tokenizer)
    ids, mask = encode_chat(tokenizer, messages)
    end = max((place + 1 for place, said in enumerate(mask) if said), default=len(ids))
    return [each for each in ids[:end] if each in special]
