"""Long chats and pairs made to fit: their oldest turns are dropped as far as needed, nothing is cut in the middle."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_answers import Unlearnable
from stages.lib.text.chat_rendering import is_learned, learned_turns
from stages.lib.text.chat_spans import EncodedChat, Thinking, TrainingSequence, training_sequences
from stages.lib.text.chat_template import Messages, UnfitChat, about

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_last_answer(messages: Messages) -> tuple[list[Mapping[str, Any]], str]:
    """The conversation up to the assistant's last turn, and what that turn says; all of it and "" if there is no such turn."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return (list(messages[: turns[-1]]), messages[turns[-1]]["content"]) if turns else (list(messages), "")


TOO_LONG = "too_long"
"""The last exchange alone is longer than the limit."""


REWRITTEN = "rewritten_by_template"
"""The template rewrites earlier turns, so that no one sequence holds all that is to be learned of an answer."""


TOOL_ANSWER = "<tool_response>"
"""How the text form of what a tool returns begins: `chat_dialect` writes it, and rows may come with it."""


class FittedChat(NamedTuple):
    """The sequences of a chat, each of at most so many tokens. None where that cannot be done, and `reason` then says why."""

    sequences: list[EncodedChat]
    dropped_messages: int
    reason: str
    lost_answers: int = 0
    """Answers whose own sequence does not fit, though others do."""
    trimmed_answers: int = 0
    """Answers off whose ends the template took spaces."""
    why: str = ""
    """What the template said or did, where the reason does not say all."""


class FittedPreference(NamedTuple):
    """Two answers to the same prompt, each with it of at most so many tokens, or None and the `reason`."""

    chosen: EncodedChat | None
    rejected: EncodedChat | None
    dropped_messages: int
    reason: str
    why: str = ""


class FittedAnswers(NamedTuple):
    """Answers to the same prompt, each with it of at most so many tokens, in their order; none, and the `reason`, where that
    cannot be done.

    The masks cover the answers only, not what the assistant says within the prompt.
    """

    answers: list[EncodedChat]
    dropped_messages: int
    reason: str
    why: str = ""
    """What the template said or did, where the reason does not say all."""


def fit_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    max_length_tokens: int,
    thinking: Thinking = "trained",
) -> FittedChat:
    """The chat in sequences of at most `max_length_tokens`, the oldest turns of each dropped as far as needed.

    One sequence, or several where the template rewrites earlier turns. The system message stays, and so does the last
    exchange with an answer to learn from; nothing is cut in the middle.
    """
    if not learned_turns(messages):
        what = "has no assistant turn that is to be learned from"
        raise DataError(Problem(about(messages), what, "Such a chat teaches nothing."))
    try:
        return fitted_chat(tokenizer, messages, max_length_tokens, thinking)
    except UnfitChat as error:
        return FittedChat([], 0, error.reason, why=why_of(error))


def fitted_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length_tokens: int, thinking: Thinking
) -> FittedChat:
    """As `fit_chat`. Raises `UnfitChat` where the template does not let it be learned."""
    whole = sequences_of(tokenizer, messages, thinking)
    fitted: list[TrainingSequence] = []
    dropped = lost = 0
    for number, sequence in enumerate(whole):
        ends = len(messages) if number == len(whole) - 1 else sequence.turns[-1] + 1
        shorter = messages[:ends]
        if len(whole) > 1:
            shorter = [unless(each, index not in sequence.turns) for index, each in enumerate(shorter)]
        found, without = without_oldest(tokenizer, shorter, sequence, max_length_tokens, thinking)
        fitted += found
        dropped = max(dropped, without)
        lost += 0 if found else len(sequence.turns)
    trimmed = sum(each.trimmed for each in fitted)
    return FittedChat([each.encoded for each in fitted], dropped, "" if fitted else TOO_LONG, lost, trimmed)


def sequences_of(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: Thinking = "trained", *, mask_from: int = 0
) -> list[TrainingSequence]:
    """The sequences of all answers from message `mask_from` on that are to be learned from."""
    return training_sequences(tokenizer, messages, learned_turns(messages, mask_from), thinking=thinking)


def unless(message: Mapping[str, Any], is_unlearned: bool) -> Mapping[str, Any]:
    return {**message, "train": False} if is_unlearned and message["role"] == "assistant" else message


def without_oldest(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sequence: TrainingSequence,
    max_length_tokens: int,
    thinking: Thinking,
) -> tuple[list[TrainingSequence], int]:
    """The sequence of these messages without as few of the oldest as needed, and how many those are; none if none does."""
    if len(sequence.encoded.input_ids) <= max_length_tokens:
        return [sequence], 0
    system, exchanges = split_exchanges(messages)
    answered = [index for index, each in enumerate(exchanges) if any(map(is_learned, each))]

    def attempt(dropped: int) -> list[TrainingSequence]:
        return sequences_of(tokenizer, [*system, *joined(exchanges[dropped:])], thinking)

    found, dropped = fewest_dropped(attempt, answered[-1], max_length_tokens)
    return found or [], len(joined(exchanges[:dropped]))


def fit_preference(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    max_length_tokens: int,
) -> FittedPreference:
    """Prompt with chosen and prompt with rejected answer, as `fit_answers` makes them fit."""
    fitted = fit_answers(tokenizer, prompt, [chosen, rejected], max_length_tokens)
    better, worse = fitted.answers or (None, None)
    return FittedPreference(better, worse, fitted.dropped_messages, fitted.reason, fitted.why)


def fit_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answers: Sequence[Messages], max_length_tokens: int
) -> FittedAnswers:
    """The prompt with each of the answers, in at most `max_length_tokens`.

    The same oldest turns of the prompt are dropped for all of them; its system message and last exchange stay.
    """
    system, exchanges = split_exchanges(prompt)

    def attempt(dropped: int) -> list[TrainingSequence]:
        kept = [*system, *joined(exchanges[dropped:])]
        all_of_them = [sequences_of(tokenizer, [*kept, *answer], mask_from=len(kept)) for answer in answers]
        if any(len(each) > 1 for each in all_of_them):
            problem = Problem(about(kept), "the chat template rewrites what an answer of several turns says first")
            raise Unlearnable(REWRITTEN, problem)
        return [each for (each,) in all_of_them]

    try:
        found, dropped = fewest_dropped(attempt, max(len(exchanges) - 1, 0), max_length_tokens, start=0)
    except UnfitChat as error:
        return FittedAnswers([], 0, error.reason, why_of(error))
    if found is None:
        return FittedAnswers([], 0, TOO_LONG)
    return FittedAnswers([each.encoded for each in found], len(joined(exchanges[:dropped])), "")


def fewest_dropped(
    attempt: Callable[[int], list[TrainingSequence]], droppable: int, max_length_tokens: int, start: int = 1
) -> tuple[list[TrainingSequence] | None, int]:
    """What `attempt(k)` gives for the smallest k from `start` to `droppable` at which everything fits, and that k."""
    results: dict[int, list[TrainingSequence]] = {}

    def fits(dropped: int) -> bool:
        results[dropped] = attempt(dropped)
        return all(len(each.encoded.input_ids) <= max_length_tokens for each in results[dropped])

    if start == 0 and fits(0):
        return results[0], 0
    fewest = 1 + bisect_left(range(1, droppable + 1), True, key=fits)
    return (results[fewest], fewest) if fewest <= droppable else (None, 0)


def why_of(error: UnfitChat) -> str:
    """What a template says of a chat that it does not take, or what happened to it there; "" where the reason says all."""
    first = error.problems[0]
    return "" if isinstance(error, Unlearnable) or isinstance(first, str) else first.what


def with_why(why: str, example: str) -> str:
    """The example of a row that was dropped, with why in front of it."""
    return f"{why}: {example}" if why else example


def split_exchanges(messages: Messages) -> tuple[list[Mapping[str, Any]], list[list[Mapping[str, Any]]]]:
    """The leading system messages, and the rest in groups that each begin with a user message that asks something.

    What a tool returns stands in a user message too, and belongs to the question that it was called for.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Mapping[str, Any]]] = []
    for message in messages[first:]:
        if (message["role"] == "user" and not is_tool_answer(message)) or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges


def is_tool_answer(message: Mapping[str, Any]) -> bool:
    return str(message["content"]).startswith(TOOL_ANSWER)


def joined(exchanges: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    return [message for exchange in exchanges for message in exchange]
