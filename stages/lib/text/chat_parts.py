"""Whether a template writes every part of a chat, found out by asking it with a word of its own in the place of each.

That the text of a part stands in what is rendered does not say so: the same text may stand there as a part of another
message, or as a word of the template. So the template renders a chat of the same shape once more, in which no part says what
another says, and each of them must be seen. Chats of one shape have one answer, which is asked for once.

    system: Answer in French.  user: Answer in French. One?  ->  system: qx00000z  user: qx00001z
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from pipeline.errors import DataError
from stages.lib.text.chat_answers import continuation, left_out
from stages.lib.text.chat_dialect import THINKING, json_of
from stages.lib.text.chat_rendering import render_guarded
from stages.lib.text.chat_template import Messages, TemplateMessage, Tool
from stages.lib.text.turn_marks import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """One part of a chat."""

    index: int
    """The number of its message."""
    word: str
    """What stands in its place."""
    said: str
    """What it says."""
    is_thought: bool = False


class PartsOfChat:
    """A chat with a word of its own in the place of each part: contents, reasoning, calls and their arguments, tools and
    their parameters."""

    def __init__(self, guarded: Messages) -> None:
        self.parts: list[Part] = []
        self.guarded = guarded
        self.messages = [self.message(index, message) for index, message in enumerate(guarded)]

    def word(self, index: int, said: Any, *, is_thought: bool = False) -> str:
        word = f"qx{len(self.parts):05d}z"
        self.parts.append(Part(index, word, str(said), is_thought))
        return word

    def number(self, index: int, said: float) -> float:
        number = 70_000_000 + len(self.parts) + (0.5 if isinstance(said, float) else 0)
        self.parts.append(Part(index, str(number), str(said)))
        return number

    def message(self, index: int, message: Mapping[str, Any]) -> TemplateMessage:
        content = str(message["content"])
        changed: TemplateMessage = {"role": message["role"], "content": content}
        if content.strip():
            word = self.word(index, content.strip())
            # Templates look for the marks of what a tool returned, to find the last question.
            wraps = content.startswith(RETURNED[0])
            changed["content"] = f"{RETURNED[0]}\n{word}\n{RETURNED[1]}" if wraps else word
        if tools := message.get("tools"):
            changed["tools"] = [self.tool(index, tool) for tool in tools]
        reasoning = str(message.get("reasoning_content") or "").strip()
        if reasoning:
            changed["reasoning_content"] = self.word(index, reasoning, is_thought=True)
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [self.call(index, call) for call in calls]
        return changed | ({"name": "qxname"} if message.get("name") else {})

    def tool(self, index: int, tool: Tool) -> Tool:
        function = tool.get("function", tool)
        changed = {**function, "name": self.word(index, function.get("name", ""))}
        if description := str(function.get("description") or "").strip():
            changed["description"] = self.word(index, description)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(parameters, Mapping) and isinstance(properties, Mapping):
            words = {name: self.word(index, name) for name in properties}
            named: dict[str, Any] = {words[name]: schema for name, schema in properties.items()}
            changed["parameters"] = {**parameters, "properties": named}
            if isinstance(required := parameters.get("required"), list):
                changed["parameters"]["required"] = [words.get(str(name), name) for name in required]
        return {**tool, "function": changed} if "function" in tool else changed

    def call(self, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        name = self.word(index, call["name"])
        return {**call, "name": name, "arguments": self.argument(index, call["arguments"])}

    def argument(self, index: int, value: Any) -> Any:
        """The value with another word for each name, text and number. One that counts as nothing stays: templates ask."""
        if isinstance(value, Mapping):
            return {self.word(index, name): self.argument(index, inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.argument(index, inner) for inner in value]
        if isinstance(value, str) and value.strip():
            return self.word(index, value)
        if isinstance(value, int | float) and value and not isinstance(value, bool):
            return self.number(index, value)
        return value

    def through(self, index: int) -> list[TemplateMessage]:
        """The messages up to this one. What was thought before it is not asked for: many templates drop it."""
        before = [
            {**message, "reasoning_content": THINKING} if "reasoning_content" in message else message
            for message in self.messages[:index]
        ]
        return [*before, *self.messages[index : index + 1]]

    def require(self, tokenizer: PreTrainedTokenizerBase, index: int) -> None:
        """Raises `Unlearnable` unless the template writes each part of the answer that message `index` is, and each part of
        what stands before it; where there is no such message, each part of a prompt."""
        asked = [part for part in self.parts if part.index < index and not part.is_thought]
        answer = [part for part in self.parts if part.index == index]
        missing = missing_words(tokenizer, self.through(index), index, [asked, answer])
        for part in (*asked, *answer):
            if part.word in missing:
                raise left_out(self.guarded, part.said)
        if CONSTANT_LEFT_OUT in missing:
            said = (json_of(call["arguments"]) for call in calls_of(self.guarded[: index + 1]) if constants_in(call))
            raise left_out(self.guarded, f"a true, false or null of {next(said)}")


RETURNED = ("<tool_response>", "</tool_response>")

Missing = dict[str, frozenset[str]]
"""Chat of words -> those that its template does not write."""

KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, int], Missing]] = WeakKeyDictionary()

MOST_SHAPES = 4096
"""Of so many shapes the answers are kept."""


def missing_words(
    tokenizer: PreTrainedTokenizerBase, chat: list[TemplateMessage], index: int, parts: Sequence[Sequence[Part]]
) -> frozenset[str]:
    """The words of `parts`, of what is asked and of the answer, that the template does not write where they belong. None
    where it refuses the chat. Found once per template and chat."""
    state = state_of(tokenizer)
    if tokenizer not in KNOWN or KNOWN[tokenizer][0] != state or len(KNOWN[tokenizer][1]) >= MOST_SHAPES:
        KNOWN[tokenizer] = (state, {})
    known = KNOWN[tokenizer][1]
    key = f"{index} {chat!r}"
    if key not in known:
        known[key] = found_missing(tokenizer, chat, index, parts)
    return known[key]


def found_missing(
    tokenizer: PreTrainedTokenizerBase, chat: list[TemplateMessage], index: int, parts: Sequence[Sequence[Part]]
) -> frozenset[str]:
    try:
        texts = prompt_and_said(tokenizer, chat, index)
    except DataError:
        return frozenset()
    missing = {part.word for text, those in zip(texts, parts, strict=True) for part in those if part.word not in text}
    wanted = sum(len(constants_in(call)) for call in calls_of(chat))
    if wanted:
        try:
            without = "".join(prompt_and_said(tokenizer, without_constants(chat), index))
        except DataError:
            return frozenset(missing)
        if len(CONSTANT.findall("".join(texts))) - len(CONSTANT.findall(without)) < wanted:
            missing.add(CONSTANT_LEFT_OUT)
    return frozenset(missing)


def prompt_and_said(tokenizer: PreTrainedTokenizerBase, chat: list[TemplateMessage], index: int) -> tuple[str, str]:
    """The prompt of the answer that message `index` is, and the answer; "" for that where there is no such message."""
    prompt = render_guarded(tokenizer, chat[:index], add_generation_prompt=True) if index else ""
    return prompt, continuation(tokenizer, chat, prompt) if index < len(chat) else ""


# What no word can stand for: how templates write true, false and null, as JSON, Python or otherwise.

CONSTANT = re.compile(r"(?i)\b(?:true|false|null|none|nil)\b")

CONSTANT_LEFT_OUT = "true, false or null"


def calls_of(messages: Messages) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        yield from message.get("tool_calls") or ()


def constants_in(call: Mapping[str, Any]) -> list[bool | None]:
    """Each true, false and null in the arguments of a call, at whatever depth."""
    found: list[bool | None] = []
    level: list[Any] = [call["arguments"]]
    while level:
        each = level.pop()
        if each is None or isinstance(each, bool):
            found.append(each)
        elif isinstance(each, Mapping):
            level += each.values()
        elif isinstance(each, list | tuple):
            level += each
    return found


def without_constants(chat: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """The messages without each true, false and null in arguments of calls."""

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items() if not is_constant_value(inner)}
        if isinstance(value, list | tuple):
            return [kept(inner) for inner in value if not is_constant_value(inner)]
        return value

    def changed(message: TemplateMessage) -> TemplateMessage:
        calls = [{**call, "arguments": kept(call["arguments"])} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}

    return [changed(message) if message.get("tool_calls") else message for message in chat]


def is_constant_value(value: Any) -> bool:
    return value is None or isinstance(value, bool)
