"""The turns of a conversation from outside: who speaks, what they say, and what tools do, in the words that are in use."""

from __future__ import annotations

import json
import re
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Dropped, text_of, type_name

Message = dict[str, str]


ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython", "api"), "tool_response"),
}
"""Names of roles in the wild -> ours. Tool calls and responses become marked text of the assistant and of the user."""


def require_order(chat: list[Message]) -> None:
    """Raises `Dropped` unless the chat is an optional system text, then user and assistant in turn."""
    turns = chat[1:] if chat and chat[0]["role"] == "system" else chat
    for index, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise Dropped("bad_turn_order", f"turn {index + 1} is the {message['role']}'s")


def turns_or_text(value: Any, name: str, role: str) -> list[Message]:
    """`turns_of`, or a plain text as what `role` says, or a transcript."""
    if not isinstance(value, str) or turns_in_json(value) is not None:
        return turns_of(value, name)
    text_of({name: value}, name)
    return transcript(value) if is_transcript(value) else [{"role": role, "content": value}]


def turns_in_json(value: str) -> Any:
    """The turn or list of turns that a text holds as JSON; None if it is any other text."""
    if not value.lstrip().startswith(("[", "{")):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    turns = found if isinstance(found, list) else [found]
    return found if turns and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns) else None


def turns_of(value: Any, name: str) -> list[Message]:
    """The turns in a field: a list of them, one of them, or either as JSON text. Roles may still be tool_call and tool_response."""
    if isinstance(value, str) and (value := turns_in_json(value)) is None:
        raise Dropped("wrong_type", f"{name} is a text, not a list of turns")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Dropped("wrong_type", f"{name} is {type_name(value)}, not a list of turns")
    if not value:
        raise Dropped("empty_field", name)
    return [turn for item in value for turn in read_turn(item)]


def read_turn(turn: Any) -> list[Message]:
    """One turn as messages: an assistant turn with tool calls gives its text and its calls."""
    if not isinstance(turn, dict):
        raise Dropped("wrong_type", f"a turn is {type_name(turn)}, not a mapping")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise Dropped("missing_field", "role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown_role", repr(role))
    role = ROLES[role.lower()]
    if role == "assistant" and turn.get("loss_weight", 1) == 0:
        raise Dropped("not_trained_on")
    calls = [{"role": "tool_call", "content": compact_json(call)} for call in tool_calls(turn)]
    content = next((turn[key] for key in ("content", "value", "text", "response") if turn.get(key) is not None), None)
    if content is None and not calls:
        raise Dropped("missing_field", "content")
    content = content_text(content, role)
    if not content.strip() and not calls:
        raise Dropped("empty_field", "content")
    said = [{"role": role, "content": content}] if content.strip() else []
    return said + calls


def tool_calls(turn: Row) -> list[Any]:
    """What the turn asks tools to do, in any of the usual places."""
    if (calls := turn.get("tool_calls")) is None:
        calls = [turn[key] for key in ("function_call", "api") if turn.get(key) is not None]
    if not isinstance(calls, list):
        raise Dropped("wrong_type", f"tool_calls is {type_name(calls)}, not a list")
    return [call["function"] if isinstance(call, dict) and "function" in call else call for call in calls]


def content_text(content: Any, role: str) -> str:
    """The text of a turn: a text, a list of text parts, or what a tool returned, as JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if role in ("tool_call", "tool_response") and not is_list_of_parts(content):
        return compact_json(content)
    if not isinstance(content, list):
        raise Dropped("wrong_type", f"content is {type_name(content)}, not a text")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise Dropped("wrong_type", f"a part of content is {type_name(part)}, not a mapping")
        if part.get("type") != "text":
            raise Dropped("not_text", f"a part is of type {part.get('type')!r}")
        texts.append(text_of(part, "text" if "text" in part else "value", optional=True))
    return "".join(texts)


def is_list_of_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def compact_json(value: Any) -> str:
    """JSON as text; a text is taken to be JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


TOOL_MARKS = {"tool_call": ("assistant", "tool_call"), "tool_response": ("user", "tool_response")}
"""Role of a tool turn -> who says it in the canonical chat, and the tag around it."""


def merge_tool_turns(turns: list[Message]) -> list[Message]:
    """The turns with tool turns as marked text; what one side says in a row because of tools is one message."""
    merged: list[Message] = []
    was_tool = False
    for turn in turns:
        is_tool = turn["role"] in TOOL_MARKS
        role, content = turn["role"], turn["content"]
        if is_tool:
            role, tag = TOOL_MARKS[turn["role"]]
            content = f"<{tag}>\n{content}\n</{tag}>"
        if merged and merged[-1]["role"] == role and (is_tool or was_tool):
            merged[-1] = {"role": role, "content": f"{merged[-1]['content']}\n{content}"}
        else:
            merged.append({"role": role, "content": content})
        was_tool = is_tool
    return merged


def system_text(row: Row) -> str:
    """The row's own system text and its tools, which a chat's system message must name."""
    parts = [text_of(row, "system", optional=True)]
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip() in ("", "[]", "null"):
        tools = None
    if tools:
        parts.append(f"<tools>\n{compact_json(tools)}\n</tools>")
    return "\n\n".join(part for part in parts if part.strip())


def with_system(chat: list[Message], system: str) -> list[Message]:
    """The chat with `system` before whatever system text it starts with."""
    if not system:
        return chat
    if chat and chat[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]
    return [{"role": "system", "content": system}, *chat]


TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(value: str) -> bool:
    return bool(TRANSCRIPT_TURN.match(value)) or value.startswith("Human:")


def transcript(value: str) -> list[Message]:
    r"""The turns of `\n\nHuman: ...\n\nAssistant: ...`. Raises `Dropped` if one of them is empty."""
    _, *parts = TRANSCRIPT_TURN.split(value if value.startswith("\n\n") else f"\n\n{value}")
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if not said.strip():
            raise Dropped("empty_field", f"a turn of {speaker}")
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
    return turns
