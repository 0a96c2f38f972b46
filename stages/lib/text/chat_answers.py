"""An answer as a server would see it given: the prompt that it is asked with, and all that the model says from there to the
token that ends its turn.

    <|im_start|>user\\nWho?<|im_end|>\\n<|im_start|>assistant\\n   <think>\\n\\n</think>\\n\\nMe.<|im_end|>   \\n
    prompt: what add_generation_prompt writes                     text                                    tail

The template writes both: the chat up to the answer as a prompt, and the chat that ends with it. Where the second is no
continuation of the first (DeepSeek's and Nemotron's prompts open a thought that finished turns do not show), the thought is
closed here, and what the template would cut out of it stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_dialect import (
    ASKED,
    CALLED,
    LAST,
    REPLY,
    THINKING,
    THOUGHT_MARKS,
    USER,
    dialect_of,
    json_of,
    written_as,
)
from stages.lib.text.chat_rendering import render_guarded
from stages.lib.text.chat_template import Messages, UnfitChat, about
from stages.lib.text.chat_thoughts import is_unopened
from stages.lib.text.turn_marks import marks_of, state_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Unlearnable(UnfitChat):
    """The template does not let the answer be learned as it is said. `reason` is a word for the ledger."""

    def __init__(self, reason: str, problem: Problem) -> None:
        super().__init__(problem)
        self.reason = reason


LEFT_OUT = "left_out_by_template"
"""A part of what is said or asked does not reach the text."""

REPEATED = "repeated_by_template"
"""What is said stands in the text more than once."""

OTHER_PROMPT = "prompt_differs"
"""The chat with the answer does not begin with the prompt that asks for it."""

NO_END = "no_end_of_turn"
"""No special token ends the answer."""


@dataclass(frozen=True)
class ChatAnswer:
    """One answer of a chat, as text. `guard` characters are still within."""

    prompt: str
    text: str
    tail: str
    thought: tuple[int, int] | None
    """Where in `text` the reasoning stands, its marks not included."""
    trimmed: bool
    """Whether the template took spaces off the ends of what is said."""

    @property
    def whole(self) -> str:
        return self.prompt + self.text


def answer_at(
    tokenizer: PreTrainedTokenizerBase,
    guarded: Messages,
    index: int,
    *,
    strict: bool = True,
    finds_thought: bool = False,
) -> ChatAnswer:
    """The answer that message `index` of a chat from `guard_special` is; where its thought stands, if that is asked for.

    Raises `Unlearnable` where the template leaves a part of it out, says it twice, asks for it otherwise or never ends it;
    with `strict` off only where it cannot be told apart at all.
    """
    message = guarded[index]
    prompt = render_guarded(tokenizer, guarded[:index], add_generation_prompt=True) if index else ""
    said = continuation(tokenizer, guarded[: index + 1], prompt)
    text, tail = split_at_end(tokenizer, said, message)
    if strict:
        require_said(guarded, message, text)
    content = message["content"]
    trimmed = bool(content) and content not in text and content.strip() in text
    thought = place_of_thought(tokenizer, guarded[: index + 1], prompt, text) if finds_thought else None
    return ChatAnswer(prompt, text, tail, thought, trimmed)


def place_of_thought(
    tokenizer: PreTrainedTokenizerBase, through: Messages, prompt: str, text: str
) -> tuple[int, int] | None:
    """Where the reasoning of the last message stands in its `text`: where another one would stand, whose word is no mark.

    None without reasoning. Raises `Unlearnable` where it cannot be told, so that what is to be masked is never learned.
    """
    written = str(through[-1].get("reasoning_content") or "")
    reasoning = written.strip()
    if not reasoning:
        return None
    other = [*through[:-1], {**through[-1], "reasoning_content": written.replace(reasoning, THINKING, 1)}]
    start = continuation(tokenizer, other, prompt).find(THINKING)
    end = start + len(reasoning)
    if start < 0 or text[start:end] != reasoning:
        raise left_out(through, reasoning)
    return start, end


OPENED = re.compile(r"<think>\s*$")
"""The end of a prompt that opens a thought."""

EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
"""How some templates begin an answer whatever is said."""


def continuation(tokenizer: PreTrainedTokenizerBase, through: Messages, prompt: str) -> str:
    """What follows upon the prompt in the chat that ends with the answer, with the reasoning that belongs to the answer."""
    reasoning = str(through[-1].get("reasoning_content") or "").strip()
    written = render_guarded(tokenizer, through)
    knows = bool(dialect_of(tokenizer).reasoning)
    opened = OPENED.search(prompt)
    if written.startswith(prompt):
        said = written[len(prompt) :]
        marks = through[-1].get(THOUGHT_MARKS)
        empty = EMPTY_THOUGHT.match(said) if reasoning else None
        if empty and (not knows or said.startswith("<think>", empty.end())):
            said = said[empty.end() :]  # an answer has one thought, and the template would write an empty one before it
        if knows or not (reasoning or marks):
            return said
        if opened:
            return f"{reasoning}\n</think>\n\n{said}"
        # Of an empty thought the marks are said as they stand: this template writes none.
        return f"<think>\n{reasoning}\n</think>\n\n{said}" if reasoning else f"{''.join(marks)}{said}"
    if opened and written.startswith(before := prompt[: opened.start()]):
        said = written[len(before) :]
        # Also a thought that is said as it would be after this prompt, without its opening mark.
        if said.startswith("<think>") or (knows and is_unopened(through[-1])):
            said = said.removeprefix("<think>")
            return said.lstrip() if reasoning else said
        return f"{reasoning}\n</think>\n\n{said}"
    raise Unlearnable(
        OTHER_PROMPT,
        Problem(
            about(through),
            "the chat template's prompt for an answer is not how the training sequence begins",
            "What add_generation_prompt writes must be what stands before the answer; without reasoning "
            "(`thinking: stripped`) some templates do so.",
        ),
    )


# Where an answer ends.


class Ends(NamedTuple):
    """How the template ends turns of the assistant."""

    tail: str
    """What it writes after the end token of the last turn."""
    of_text: str
    """The token that ends an answer, where the template leaves it to what comes next."""
    of_calls: str
    """The same for calls of tools."""


KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, int], Ends]] = WeakKeyDictionary()


def ends_of(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Found once per tokenizer and template, from a short chat and from how it goes on."""
    state = state_of(tokenizer)
    known = KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = KNOWN[tokenizer] = (state, found_ends(tokenizer))
    return known[1]


def found_ends(tokenizer: PreTrainedTokenizerBase) -> Ends:
    dialect, special = dialect_of(tokenizer), marks_of(tokenizer).pattern.pattern
    ending = re.compile(rf"\s*((?:{special})*)({special})")
    replied = [ASKED, {"role": "assistant", "content": REPLY}]
    after = written_as(tokenizer, replied, dialect).rpartition(REPLY)[2]
    if found := ending.match(after):
        return Ends(after[found.end() :], "", "")
    asked_on = written_as(tokenizer, [*replied, {"role": "user", "content": LAST}], dialect)
    found = ending.match(asked_on.partition(REPLY)[2])
    called = written_as(tokenizer, CALLED[:3], dialect)
    answered = written_as(tokenizer, CALLED[:4], dialect)
    next_turn = re.compile(special).search(answered, len(called)) if called and answered.startswith(called) else None
    return Ends("", found[2] if found else "", next_turn[0] if next_turn else "")


def split_at_end(tokenizer: PreTrainedTokenizerBase, said: str, message: Mapping[str, Any]) -> tuple[str, str]:
    """What is said with the special token that ends it, and what the template writes after that."""
    ends = ends_of(tokenizer)
    special = marks_of(tokenizer).at_end
    body = said.removesuffix(ends.tail) if ends.tail else said
    for text in (body, said.rstrip()):
        if special.search(text):
            return text, said[len(text) :]
    if end := ends.of_calls if message.get("tool_calls") else ends.of_text:
        return said + end, ""
    raise Unlearnable(
        NO_END,
        Problem(
            "chat_template",
            "does not end the assistant's turns with a special token",
            "A model trained on it would never learn to stop: use another template.",
        ),
    )


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that end an answer, and calls of tools where the template knows such. None where it cannot be told."""
    found = []
    for chat, index in (([{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}], 1), (CALLED, 2)):
        if index == 2 and not dialect_of(tokenizer).calls:
            continue
        try:
            text = answer_at(tokenizer, chat, index, strict=False).text
        except DataError:
            continue
        if ends := marks_of(tokenizer).at_end.search(text):
            found.append(ends[0])
    return list(dict.fromkeys(found))


# What is said must be there.


def require_said(messages: Messages, message: Mapping[str, Any], text: str) -> None:
    """Raises `Unlearnable` unless each part of what the assistant says stands in the text, and stands there once."""
    content = message["content"].strip()
    for part in (content, str(message.get("reasoning_content") or "").strip()):
        if part not in text:
            raise left_out(messages, part)
    if len(content) >= LONG_ENOUGH and text.count(content) > 1:
        raise Unlearnable(
            REPEATED, Problem(about(messages), f"the chat template writes {content[:40]!r} more than once")
        )
    for call in message.get("tool_calls") or ():
        for part in (call["name"], *leaves(call["arguments"])):
            require_written(messages, part, text)


LONG_ENOUGH = 16
"""Characters of a text that does not stand twice somewhere by chance."""


def require_asked(messages: Messages, text: str) -> None:
    """Raises `Unlearnable` unless what everyone says before the last answer, and each tool, stands in the text."""
    for message in messages:
        require_written(messages, message["content"].strip(), text)
        for tool in message.get("tools") or ():
            function = tool.get("function", tool)
            require_written(messages, function.get("name", ""), text)
            # A name may stand there because the tool is called.
            require_written(messages, str(function.get("description") or "").strip(), text)


def require_written(messages: Messages, part: Any, text: str) -> None:
    """As `require_said`, of what templates may write as JSON, Python or XML: calls, tools, and what these return."""
    value = str(part)
    if value in text:
        return
    if not any(form in text for form in (json_of(value)[1:-1], json_of(part), repr(value)[1:-1])):
        raise left_out(messages, value)


def leaves(value: Any) -> Iterator[str | float]:
    """The texts and numbers in a nested value."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def left_out(messages: Messages, part: str) -> Unlearnable:
    return Unlearnable(
        LEFT_OUT,
        Problem(
            about(messages),
            f"the chat template leaves {part[:60]!r} out",
            "Use a template that writes it (chat_template), or drop the row.",
        ),
    )
