"""What a chat template knows of turns, reasoning and tools, found out by asking it; and chats put in those words.

Templates read the same things under different names, or not at all. A template that knows tools gets them in its own form;
for one that does not, calls, what tools returned and the list of tools stand in the text, between marks:

    <tools>[...]</tools>   <tool_call>{...}</tool_call>   <tool_response>...</tool_response>   <think>...</think>
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from pipeline.errors import DataError
from stages.lib.text.chat_template import Messages, TemplateMessage, Tool, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Under which templates look for what an assistant thought: of vLLM and Qwen, of Gemma, of gpt-oss and LFM2."""

WITHIN_CONTENT = "content"
"""The template takes reasoning in the content, between `<think>` and `</think>`."""


@dataclass(frozen=True)
class Dialect:
    """How one template wants its chats."""

    parts: bool = False
    """Contents as lists of `{"type": "text"}`, as templates of models that also see want them."""
    reasoning: str = ""
    """One of `REASONING_NAMES`, `WITHIN_CONTENT`, or "" where the template writes no reasoning."""
    calls: Literal["mapping", "json", ""] = ""
    """How it reads the arguments of calls: as mapping or as JSON; "" where it knows no calls."""
    tools: bool = False
    """Whether it writes the list of tools."""


KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, Dialect]] = WeakKeyDictionary()


def dialect_of(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """What the tokenizer's chat template knows; found once per template."""
    known = KNOWN.get(tokenizer)
    if known is None or known[0] != str(tokenizer.chat_template):
        known = KNOWN[tokenizer] = (str(tokenizer.chat_template), found_dialect(tokenizer))
    return known[1]


USER, REPLY, THINKING, RESULT, LAST = "Qxuser", "Qxreply", "Qxthought", "Qxresult", "Qxlast"
"""Words that stand nowhere else in a template."""

PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "qxtool",
        "description": "Qxdescription",
        "parameters": {"type": "object", "properties": {"qxname": {"type": "string", "description": "d"}}},
    },
}

PROBE_CALL = {"name": "qxtool", "arguments": {"qxname": "Qxvalue"}}

ASKED = {"role": "user", "content": USER}

CALLED: list[dict[str, Any]] = [
    {"role": "system", "content": "", "tools": [PROBE_TOOL]},
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "content": RESULT},
    {"role": "assistant", "content": LAST},
]
"""A chat in which a tool is used."""


def found_dialect(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    def writes(words: Sequence[str], messages: Messages, dialect: Dialect) -> bool:
        written = written_as(tokenizer, messages, dialect)
        return all(word in written for word in words)

    replied = [ASKED, {"role": "assistant", "content": REPLY}]
    parts = not writes((USER, REPLY), replied, Dialect()) and writes((USER, REPLY), replied, Dialect(parts=True))
    thought = [ASKED, {"role": "assistant", "content": REPLY, "reasoning_content": THINKING}]
    names = (*REASONING_NAMES, WITHIN_CONTENT)
    reasoning = (name for name in names if writes((THINKING, REPLY), thought, Dialect(parts, name)))
    tools = writes(("qxtool", "Qxdescription"), CALLED[:2], Dialect(parts, tools=True))
    words = ("qxtool", "Qxvalue", RESULT, LAST)

    def writes_calls(how: Literal["mapping", "json"], *also: str) -> bool:
        return writes((*words, *also), CALLED, Dialect(parts, calls=how, tools=tools))

    # One that prints the arguments as they come would print a mapping in Python's form, and JSON as JSON.
    printed = str(PROBE_CALL["arguments"]), json_of(PROBE_CALL["arguments"])
    forms = CALL_FORMS[::-1] if writes_calls("mapping", printed[0]) and writes_calls("json", printed[1]) else CALL_FORMS
    calls = (how for how in forms if writes_calls(how))
    return Dialect(parts, next(reasoning, ""), next(calls, ""), tools)


CALL_FORMS: tuple[Literal["mapping", "json"], ...] = ("mapping", "json")


def written_as(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, dialect: Dialect, *, add_generation_prompt: bool = False
) -> str:
    """The rendered chat; "" where the template refuses it or fails."""
    said, tools = in_dialect(messages, dialect)
    try:
        return apply_template(tokenizer, said, tools, add_generation_prompt=add_generation_prompt)
    except DataError:
        return ""


# Chats in the words of a template.


def in_dialect(messages: Messages, dialect: Dialect) -> tuple[list[TemplateMessage], list[Tool] | None]:
    """The messages as the template reads them, and the tools that it is given besides."""
    tools = tools_of(messages)
    said = with_tools_in_text(messages, [] if dialect.tools else tools)
    said = [with_reasoning_as(each, dialect.reasoning) if each["role"] == "assistant" else each for each in said]
    said = list(with_numbered_calls(said, dialect)) if dialect.calls else calls_in_text(said)
    if dialect.parts:
        said = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in said]
    return said, (tools or None) if dialect.tools else None


def tools_of(messages: Messages) -> list[Tool]:
    """The tools that the assistant may call: they stand beside the content of the system message."""
    return list(messages[0].get("tools") or ()) if messages and messages[0]["role"] == "system" else []


def with_tools_in_text(messages: Messages, tools: Sequence[Tool]) -> list[TemplateMessage]:
    """The messages, `tools` in the text of the system message. One that held nothing but tools and says none is left out."""
    said = [{key: value for key, value in message.items() if key not in ("train", "tools")} for message in messages]
    if tools:
        listed = f"<tools>\n{json_of(list(tools))}\n</tools>"
        said[0]["content"] = "\n\n".join(part for part in (said[0]["content"], listed) if part)
    return said[1:] if messages and messages[0].get("tools") and not said[0]["content"] else said


def with_numbered_calls(messages: Sequence[TemplateMessage], dialect: Dialect) -> Iterator[TemplateMessage]:
    """Calls as servers give them to templates, with numbers, and the number of its call beside each answer of a tool."""
    number = 0
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting = []
            for call in calls:
                number += 1
                arguments = call["arguments"] if dialect.calls == "mapping" else json_of(call["arguments"])
                function = {"name": call["name"], "arguments": arguments}
                # Nine letters and digits: Mistral's templates refuse any other identifier.
                waiting.append({"id": f"call{number:05d}", "type": "function", "function": function})
            message = {**message, "tool_calls": [*waiting]}
        elif message["role"] == "tool" and waiting:
            call = waiting.pop(0)
            message = {"name": call["function"]["name"], **message, "tool_call_id": call["id"]}
        yield message


def with_reasoning_as(message: TemplateMessage, name: str) -> TemplateMessage:
    """An assistant's message with its reasoning where the template looks for it; without it where it looks nowhere."""
    plain = {key: value for key, value in message.items() if key not in ("reasoning_content", THOUGHT_MARKS)}
    reasoning = message.get("reasoning_content") or ""
    if name == WITHIN_CONTENT and (reasoning or THOUGHT_MARKS in message):
        before, after = message.get(THOUGHT_MARKS) or ("<think>\n", "\n</think>\n\n")
        return {**plain, "content": f"{before}{reasoning}{after}{message['content']}"}
    return {**plain, name: reasoning.strip()} if reasoning and name else plain


THOUGHT_MARKS = "thought_marks"
"""Key of a message: what stood around a thought that was found within its content."""


def json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# The text form, for templates that know no calls.


def calls_in_text(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """The messages with calls and what tools returned as marked text; what the user's side says in a row because of tools
    is one message."""
    merged: list[TemplateMessage] = []
    after_tool = False
    for message in messages:
        is_tool, content = message["role"] == "tool", message["content"]
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "name")}
        if is_tool:
            plain = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        for call in message.get("tool_calls") or ():
            between = "" if not plain["content"] or plain["content"].endswith("\n\n") else "\n"
            plain["content"] += f"{between}<tool_call>\n{json_of(call)}\n</tool_call>"
        if merged and merged[-1]["role"] == plain["role"] == "user" and (is_tool or after_tool):
            merged[-1] = {**plain, "content": f"{merged[-1]['content']}\n{plain['content']}"}
        else:
            merged.append(plain)
        after_tool = is_tool
    return merged
