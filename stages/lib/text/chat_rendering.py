"""Chats as text, by their tokenizer's own template. What a message says stays apart from what the template writes, also
where it spells a special token. Nothing here imports torch or transformers before it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, Preempted, Problem
from stages.lib.text.turn_marks import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, Any]]
"""`role` and `content`, both texts; `train: False` in an assistant's turn that nothing is to be learned from."""

Prompt = Messages | str
"""A conversation up to the assistant's turn, or raw text."""


GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


NONCHARACTERS = [chr(code) for code in range(0xFDE0, 0xFDF0)]
"""Unicode keeps these for internal use: no text should have them, and which one is free is looked up per chat."""


class RefusedChat(DataError):
    """The template itself refuses the chat, such as one with a system message."""


# How a chat becomes text, and text becomes ids.


@dataclass(frozen=True)
class Rendered:
    """A rendered chat. Special tokens that a message spells have `guard` within ("" where none does)."""

    text: str
    guard: str

    def upto(self, end: int) -> Rendered:
        return Rendered(self.text[:end], self.guard)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> Rendered:
    guarded, guard = guard_special(tokenizer, messages)
    text, _ = apply_template(tokenizer, guarded, add_generation_prompt=add_generation_prompt)
    return Rendered(text, guard)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered text and the character ranges of its generation blocks; None if the template has no such blocks.

    Raises `RefusedChat` where the template refuses it, and `DataError` where it fails on it, or takes more time or memory
    than it may.
    """
    from stages.lib.text.chat_probe import require_bounded
    from stages.lib.text.chat_sandbox import Refusal, render_template

    template = template_of(tokenizer)
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    variables |= {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        require_bounded(template, messages, variables)
        text, spans = render_template(template, messages, variables)
    except Preempted:
        raise
    except Refusal as error:
        raise RefusedChat(Problem(about(messages), f"the chat template refuses it: {error}")) from None
    except Exception as error:  # a template is anybody's program
        raise DataError(
            Problem(
                "chat_template",
                f"cannot render {about(messages)}: {what_happened(error)}",
                "Correct the template, or use a model or tokenizer with another one.",
            )
        ) from None
    return text, spans if GENERATION_BLOCK.search(template) else None


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, the default one where it has several. Raises `DataError` if there is none."""
    hint = "Use a tokenizer that was made or trained for chats."
    if not tokenizer.chat_template:
        raise DataError(Problem("chat_template", "the tokenizer has none", hint))
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(Problem("chat_template", str(error).splitlines()[0], hint)) from None


def what_happened(error: Exception) -> str:
    from stages.lib.text.chat_budget import OverLimit

    said = (str(error).splitlines() or [""])[0][:200]
    return said if isinstance(error, OverLimit) else f"{type(error).__name__}: {said}"


def guard_special(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[dict[str, str]], str]:
    """The messages with a guard character inside each special token that their content spells, and that character.

    The guard keeps what the template writes and what a message says apart. It is "" if no message spells any.
    """
    require_messages(messages)
    # A template sees what a server would show it, and no mark of ours.
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    pattern = special_pattern(tokenizer)
    contents = [message["content"] for message in messages]
    if not any(pattern.search(content) for content in contents):
        return [dict(message) for message in messages], ""
    guard = next((each for each in NONCHARACTERS if not any(each in content for content in contents)), "")
    if not guard or any(len(token.content) < 2 for token in special_tokens(tokenizer)):
        raise DataError(Problem(about(messages), "spells special tokens in a way that cannot be told from real ones"))
    guarded = []
    for message in messages:
        content = message["content"]
        while pattern.search(content):  # again, because two spelled tokens may overlap
            content = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], content)
        guarded.append({**message, "content": content})
    return guarded, guard


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
    names = sorted((token.content for token in special_tokens(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


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


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether the message is an assistant's turn that is to be learned from."""
    return message["role"] == "assistant" and bool(message.get("train", True))


def about(messages: Messages) -> str:
    """A few words by which the reader finds the chat again."""
    first = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return f"chat {first[:60]!r}"
