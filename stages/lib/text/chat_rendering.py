"""Chats as text, by their tokenizer's own template. What a message says stays apart from what the template writes, also
where it spells a special token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_dialect import dialect_of, in_dialect
from stages.lib.text.chat_template import Messages, about, apply_template
from stages.lib.text.chat_thoughts import thought_apart
from stages.lib.text.turn_marks import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONCHARACTERS = [chr(code) for code in range(0xFDE0, 0xFDEF)]
"""Unicode keeps these for internal use: no text should have them, and which one is free is looked up per chat."""


@dataclass(frozen=True)
class Rendered:
    """A rendered chat. Special tokens that a message spells have `guard` within ("" where none does)."""

    text: str
    guard: str


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> Rendered:
    """The whole chat, and the header of the assistant's next turn where that is asked for."""
    guarded, guard = guard_special(tokenizer, messages)
    return Rendered(render_guarded(tokenizer, guarded, add_generation_prompt=add_generation_prompt), guard)


def render_guarded(
    tokenizer: PreTrainedTokenizerBase, guarded: Messages, *, add_generation_prompt: bool = False
) -> str:
    """What the template makes of messages from `guard_special`."""
    said, tools = in_dialect(guarded, dialect_of(tokenizer))
    return apply_template(tokenizer, said, tools, add_generation_prompt=add_generation_prompt)


def guard_special(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[dict[str, Any]], str]:
    """The messages with a guard character inside each special token that they spell, and that character.

    The guard keeps what the template writes and what a message says apart. It is "" if no message spells any. A thought
    within a content stands apart afterwards: its marks are no text.
    """
    require_messages(messages)
    apart = [thought_apart(message) for message in messages]
    pattern = special_pattern(tokenizer)
    texts = [text for message in apart for text in texts_within(message)]
    if not any(pattern.search(text) for text in texts):
        return apart, ""
    guard = next((each for each in NONCHARACTERS if not any(each in text for text in texts)), "")
    if not guard or any(len(token.content) < 2 for token in special_tokens(tokenizer)):
        raise DataError(Problem(about(messages), "spells special tokens in a way that cannot be told from real ones"))

    def with_guards(text: str) -> str:
        while pattern.search(text):  # again, because two spelled tokens may overlap
            text = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], text)
        return text

    return [{key: guarded_value(key, value, with_guards) for key, value in message.items()} for message in apart], guard


SAID_IN = ("content", "reasoning_content", "tool_calls", "tools", "name")
"""Keys of messages under which texts from outside stand."""


def texts_within(message: Mapping[str, Any]) -> Iterator[str]:
    """Every text that a message holds, at whatever depth."""
    level: list[Any] = [message[key] for key in SAID_IN if key in message]
    while level:
        each = level.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            level += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            level += each


def guarded_value(key: str, value: Any, change: Callable[[str], str]) -> Any:
    """The value of a message's key with `change` done to each text in it; as it is where the key holds none from outside."""

    def changed(each: Any) -> Any:
        if isinstance(each, str):
            return change(each)
        if isinstance(each, Mapping):
            return {changed(name): changed(inner) for name, inner in each.items()}
        return [changed(inner) for inner in each] if isinstance(each, list | tuple) else each

    return changed(value) if key in SAID_IN else value


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The added tokens that are special, or with which the template marks turns: text must never produce them by itself."""
    flagged = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*flagged, *marks_of(tokenizer).tokens]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    marks = {token.content for token in marks_of(tokenizer).tokens}
    added = tokenizer.added_tokens_decoder
    return frozenset(index for index, token in added.items() if token.special or token.content in marks)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, the longest first; nothing if there is none."""
    return marks_of(tokenizer).pattern


def require_messages(messages: Messages) -> None:
    """Raises `DataError` unless each message is a mapping with a role and a content that are texts."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                Problem(
                    f"message {index + 1}",
                    f"is no message: {message!r:.80}",
                    "It needs a role and a content, both texts.",
                )
            )
    if not messages:
        raise DataError(Problem("chat", "has no messages"))


def learned_turns(messages: Messages, mask_from: int = 0) -> list[int]:
    """The numbers of the messages from `mask_from` on that are to be learned from. Raises `DataError` if they are none."""
    require_messages(messages)
    return [index for index, each in enumerate(messages) if index >= mask_from and is_learned(each)]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the message is an assistant's turn that is to be learned from."""
    return message["role"] == "assistant" and bool(message.get("train", True))
