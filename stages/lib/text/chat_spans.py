"""Chats as tokens, and which of them the assistant says.

What is learned of an answer is what the model would have had to say: the tokens before it are exactly those of the prompt
that a server asks with. Answers share a sequence as long as each prompt continues what stands there already. Where a template
rewrites earlier turns, as those do that drop old thoughts, or where the border between prompt and answer runs through a
token, an answer gets a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_answers import ChatAnswer, Unlearnable, answer_at, require_asked
from stages.lib.text.chat_parts import PartsOfChat
from stages.lib.text.chat_rendering import Rendered, guard_special, learned_turns, render_guarded, require_messages
from stages.lib.text.chat_template import Messages, about
from stages.lib.text.chat_thoughts import mark_left, without_thought
from stages.lib.text.chat_tokens import ends_with_special, tokenize, tokenize_stretches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["trained", "masked", "stripped"]
"""What becomes of reasoning: it carries loss, it is read but carries none, or it is taken out."""


class EncodedChat(NamedTuple):
    """A chat as tokens: the ids, and 1 for each token of an assistant turn including the one that ends it, else 0."""

    input_ids: list[int]
    assistant_mask: list[int]


class TrainingSequence(NamedTuple):
    """One sequence of a chat, the messages whose answers are learned from it, and how many of those lost outer spaces."""

    encoded: EncodedChat
    turns: tuple[int, ...]
    trimmed: int


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, mask_from: int = 0) -> EncodedChat:
    """The last sequence of the chat: all of it, with a mask over the assistant's turns from message `mask_from` on.

    A turn's mask covers its content and the special token that ends it, not its header. Turns that the template rewrites
    later are not in the mask. Nothing is asked of the template but that it can be rendered.
    """
    turns = learned_turns(messages, mask_from)
    return training_sequences(tokenizer, messages, turns, strict=False)[-1].encoded


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, strict: bool = False) -> list[int]:
    """The ids of the chat so far and the header of the assistant's next turn: what a model is asked with.

    With `strict`, raises `Unlearnable` where the template leaves out a part of what is said.
    """
    guarded, guard = guard_special(tokenizer, messages)
    text = render_guarded(tokenizer, guarded, add_generation_prompt=True)
    if strict:
        require_asked(guarded, text)
        PartsOfChat(guarded).require(tokenizer, len(guarded))
    return tokenize(tokenizer, Rendered(text, guard))[0]


def training_sequences(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    turns: Collection[int],
    *,
    thinking: Thinking = "trained",
    strict: bool = True,
) -> list[TrainingSequence]:
    """The sequences from which the assistant's messages `turns` are learned, in their order; the last goes on to the end
    of the chat. One without any loss where there are no turns.

    With `strict`, raises `Unlearnable` where the template does not write what is said, exactly once. Where thoughts are
    masked or stripped, raises it where one would be learned all the same. Raises `DataError` where the template refuses or
    fails.
    """
    require_messages(messages)
    if thinking != "trained":
        require_thoughts_apart(tokenizer, messages, turns, thinking)
    if thinking == "stripped":
        messages = [without_thought(each) for each in messages]
    guarded, guard = guard_special(tokenizer, messages)
    masked = thinking == "masked"
    answers = [answer_at(tokenizer, guarded, index, strict=strict, finds_thought=masked) for index in sorted(turns)]
    if not answers:
        ids, _ = tokenize(tokenizer, Rendered(render_guarded(tokenizer, guarded), guard))
        return [TrainingSequence(once_begun(tokenizer, messages, EncodedChat(ids, [0] * len(ids))), (), 0)]
    if strict:
        parts = PartsOfChat(guarded)
        for index in sorted(turns):
            parts.require(tokenizer, index)
    sequences = []
    for group in continued(sorted(turns), answers):
        last = group[-1][1]
        if strict:
            require_asked(guarded[: group[-1][0]], last.prompt)
        text = last.whole + last.tail
        if last is answers[-1] and len(guarded) > group[-1][0] + 1:
            following = render_guarded(tokenizer, guarded)
            text = following if following.startswith(last.whole) else text
        sequences += encoded_group(tokenizer, group, Rendered(text, guard), masked)
    for each in sequences:
        once_begun(tokenizer, messages, each.encoded)
    return sequences


THOUGHT_LEFT = "thought_within_answer"
"""A thought, or a mark of one, stands elsewhere than where an answer begins: it cannot be masked or stripped."""


def require_thoughts_apart(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, turns: Collection[int], thinking: Thinking
) -> None:
    """Raises `Unlearnable` where a mark of a thought would stay in what is learned, or, stripped, in any answer."""
    for index, message in enumerate(messages):
        is_meant = message["role"] == "assistant" and (index in turns or thinking == "stripped")
        if is_meant and (mark := mark_left(tokenizer, message)):
            raise Unlearnable(
                THOUGHT_LEFT,
                Problem(
                    about(messages),
                    f"an answer has {mark!r} elsewhere than around a thought at its beginning: it cannot be {thinking}",
                    "Write one thought, between <think> and </think>, before the answer; or learn it (`thinking: trained`).",
                ),
            )


NumberedAnswers = list[tuple[int, ChatAnswer]]
"""Answers, each with the number of its message."""


def continued(turns: Sequence[int], answers: Sequence[ChatAnswer]) -> list[NumberedAnswers]:
    """The answers in groups, in each of which every prompt begins with all that stands before it."""
    groups: list[NumberedAnswers] = []
    for index, answer in zip(turns, answers, strict=True):
        if groups and answer.prompt.startswith(groups[-1][-1][1].whole):
            groups[-1].append((index, answer))
        else:
            groups.append([(index, answer)])
    return groups


def encoded_group(
    tokenizer: PreTrainedTokenizerBase, group: NumberedAnswers, rendered: Rendered, masks_thoughts: bool
) -> list[TrainingSequence]:
    """The group as one sequence, or, where a token reaches across a border, each answer after the tokens of its prompt."""
    ids, offsets = tokenize(tokenizer, rendered)
    mask = [0] * len(ids)
    for _, answer in group:
        start, end = len(answer.prompt), len(answer.whole)
        first = next(token for token, (_, stop) in enumerate(offsets) if stop > start)
        after = next((token for token, (begin, _) in enumerate(offsets) if begin >= end), len(ids))
        header = Rendered(answer.prompt, rendered.guard)
        is_clean = offsets[first][0] >= start and offsets[after - 1][1] <= end
        # Between special tokens a text is encoded by itself; elsewhere what follows can change what stands before.
        if not is_clean or (
            not ends_with_special(tokenizer, header.text) and tokenize(tokenizer, header)[0] != ids[:first]
        ):
            return [encoded_after_prompt(tokenizer, each, rendered.guard, masks_thoughts) for each in group]
        mask[first:after] = said_mask(answer, offsets[first:after], start, masks_thoughts)
    turns = tuple(index for index, _ in group)
    return [TrainingSequence(EncodedChat(ids, mask), turns, sum(answer.trimmed for _, answer in group))]


def encoded_after_prompt(
    tokenizer: PreTrainedTokenizerBase, numbered: tuple[int, ChatAnswer], guard: str, masks_thoughts: bool
) -> TrainingSequence:
    """The tokens of the prompt, and after them those of the answer, as a model says them that was given that prompt."""
    index, answer = numbered
    prompt, _ = tokenize(tokenizer, Rendered(answer.prompt, guard))
    ids, offsets = tokenize_stretches(tokenizer, Rendered(answer.text, guard), begins=not prompt)
    mask = [0] * len(prompt) + said_mask(answer, offsets, 0, masks_thoughts)
    return TrainingSequence(EncodedChat([*prompt, *ids], mask), (index,), int(answer.trimmed))


def said_mask(answer: ChatAnswer, offsets: Sequence[tuple[int, int]], shift: int, masks_thoughts: bool) -> list[int]:
    """1 for each token of an answer that begins at character `shift`, and 0 for those of its thought if these are masked."""
    if not masks_thoughts or answer.thought is None:
        return [1] * len(offsets)
    start, end = (place + shift for place in answer.thought)
    return [int(stop <= start or begin >= end) for begin, stop in offsets]


def once_begun(tokenizer: PreTrainedTokenizerBase, messages: Messages, encoded: EncodedChat) -> EncodedChat:
    """The sequence. Raises `DataError` if it begins twice."""
    ids = encoded.input_ids
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError(
            Problem(
                about(messages),
                f"begins with {tokenizer.bos_token} twice",
                "The chat template must write it once, and nothing else may.",
            )
        )
    return encoded
