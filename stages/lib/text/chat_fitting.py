"""Long chats and pairs made to fit: their oldest turns are dropped as far as needed, nothing is cut in the middle."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_rendering import Messages, RefusedChat, about, is_learned
from stages.lib.text.chat_spans import BoundaryError, EncodedChat, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_last_answer(messages: Messages) -> tuple[list[Mapping[str, str]], str]:
    """The conversation up to the assistant's last turn, and what that turn says; all of it and "" if there is no such turn."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return (list(messages[: turns[-1]]), messages[turns[-1]]["content"]) if turns else (list(messages), "")


TOO_LONG = "too_long"
"""The last exchange alone is longer than the limit."""


PROMPT_BOUNDARY = "prompt_boundary"
"""A token reaches from the assistant's header into its answer: no prompt could lead to these tokens."""


REFUSED = "refused_by_template"
"""The chat template itself refuses the chat, such as one with a system message."""


TOOL_ANSWER = "<tool_response>"
"""How the text form of what a tool returns begins: `stages/lib/sources/turns.py` writes it."""


class FittedChat(NamedTuple):
    """A chat of at most so many tokens. `encoded` is None where that cannot be done, and `reason` then says why."""

    encoded: EncodedChat | None
    dropped_messages: int
    reason: str


class FittedPreference(NamedTuple):
    """Two answers to the same prompt, each with it of at most so many tokens, or None and the `reason`.

    The masks cover the answers only, not what the assistant says within the prompt.
    """

    chosen: EncodedChat | None
    rejected: EncodedChat | None
    dropped_messages: int
    reason: str


def fit_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length_tokens: int) -> FittedChat:
    """The chat in at most `max_length_tokens`, its oldest turns dropped as far as needed.

    The system message stays, and so does the last exchange with an answer to learn from; nothing is cut in the middle.
    """
    system, exchanges = split_exchanges(messages)
    answered = [index for index, each in enumerate(exchanges) if any(map(is_learned, each))]
    if not answered:
        what = "has no assistant turn that is to be learned from"
        raise DataError(Problem(about(messages), what, "Such a chat teaches nothing."))

    def attempt(dropped: int) -> list[EncodedChat]:
        return [encode_chat(tokenizer, [*system, *joined(exchanges[dropped:])])]

    fitted, dropped, reason = fit(attempt, answered[-1], max_length_tokens)
    return FittedChat(fitted[0] if fitted else None, len(joined(exchanges[:dropped])), reason)


def fit_preference(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    max_length_tokens: int,
) -> FittedPreference:
    """Prompt with chosen and prompt with rejected answer, each in at most `max_length_tokens`.

    The same oldest turns of the prompt are dropped for both; its system message and last exchange stay.
    """
    system, exchanges = split_exchanges(prompt)

    def attempt(dropped: int) -> list[EncodedChat]:
        kept = [*system, *joined(exchanges[dropped:])]
        return [encode_chat(tokenizer, [*kept, *answer], mask_from=len(kept)) for answer in (chosen, rejected)]

    fitted, dropped, reason = fit(attempt, max(len(exchanges) - 1, 0), max_length_tokens)
    chosen_ids, rejected_ids = fitted or (None, None)
    return FittedPreference(chosen_ids, rejected_ids, len(joined(exchanges[:dropped])), reason)


def fit(
    attempt: Callable[[int], list[EncodedChat]], droppable: int, max_length_tokens: int
) -> tuple[list[EncodedChat] | None, int, str]:
    """What `attempt(k)` gives for the smallest k up to `droppable` at which everything fits, k, and else a reason."""
    results: dict[int, list[EncodedChat]] = {}

    def fits(dropped: int) -> bool:
        results[dropped] = attempt(dropped)
        return all(len(each.input_ids) <= max_length_tokens for each in results[dropped])

    try:
        fewest = 0 if fits(0) else 1 + bisect_left(range(1, droppable + 1), True, key=fits)
    except BoundaryError:
        return None, 0, PROMPT_BOUNDARY
    except RefusedChat:
        return None, 0, REFUSED
    if fewest > droppable:
        return None, 0, TOO_LONG
    return results[fewest], fewest, ""


def split_exchanges(messages: Messages) -> tuple[list[Mapping[str, str]], list[list[Mapping[str, str]]]]:
    """The leading system messages, and the rest in groups that each begin with a user message that asks something.

    What a tool returns stands in a user message too, and belongs to the question that it was called for.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Mapping[str, str]]] = []
    for message in messages[first:]:
        if (message["role"] == "user" and not is_tool_answer(message)) or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges


def is_tool_answer(message: Mapping[str, Any]) -> bool:
    return str(message["content"]).startswith(TOOL_ANSWER)


def joined(exchanges: Sequence[Sequence[Mapping[str, str]]]) -> list[Mapping[str, str]]:
    return [message for exchange in exchanges for message in exchange]
