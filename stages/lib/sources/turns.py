"""The turns of a conversation from outside: who speaks, what they say, and what tools do, in the words that are in use."""

from __future__ import annotations

import json
import re
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, is_blank, text_of, type_name

Message = dict[str, Any]
"""`role` and `content`, both texts; `train: False` in turns of the assistant that nothing is to be learned from."""


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


def turns_or_text(value: Any, name: str, role: str, conversion: Conversion) -> list[Message]:
    """`turns_of`, or a plain text as what `role` says. A text holds turns only where the source says so."""
    if not isinstance(value, str):
        return turns_of(value, name, conversion)
    if conversion.turns_in_text == "json" and turns_in_json(value) is not None:
        return turns_of(value, name, conversion)
    text_of({name: value}, name)
    if conversion.turns_in_text == "transcript" and is_transcript(value):
        return transcript(value)
    if conversion.turns_in_text is None and (is_transcript(value) or turns_in_json(value) is not None):
        conversion.notice("a text that looks like turns was taken as it stands: see turns_in_text")
    return [{"role": role, "content": value}]


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


def turns_of(value: Any, name: str, conversion: Conversion) -> list[Message]:
    """The turns in a field: a list of them, one of them, or either as JSON text. Roles may still be tool_call and tool_response."""
    if isinstance(value, str) and (value := turns_in_json(value)) is None:
        raise Dropped("wrong_type", f"{name} is a text, not a list of turns")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Dropped("wrong_type", f"{name} is {type_name(value)}, not a list of turns")
    if not value:
        raise Dropped("empty_field", name)
    return [turn for item in value for turn in read_turn(item, conversion)]


ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text", "response")
CALL_KEYS = ("tool_calls", "function_call", "api")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
TRAIN_KEYS = ("weight", "loss_weight", "train", "loss", "trainable")
"""Of OpenAI and Mistral, of others, of Axolotl, of ms-swift, of verl: whether an assistant turn is to be trained on."""

TURN_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *CALL_KEYS, *REASONING_KEYS, *TRAIN_KEYS))


def read_turn(turn: Any, conversion: Conversion) -> list[Message]:
    """One turn as messages: an assistant turn with tool calls gives its text and its calls."""
    if not isinstance(turn, dict):
        raise Dropped("wrong_type", f"a turn is {type_name(turn)}, not a mapping")
    role = one_of(turn, ROLE_KEYS)
    if role is None:
        raise Dropped("missing_field", "role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Dropped("unknown_role", repr(role))
    role = ROLES[role.lower()]
    calls = [{"role": "tool_call", "content": compact_json(call)} for call in tool_calls(turn)]
    content = one_of(turn, CONTENT_KEYS)
    if content is None and not calls:
        raise Dropped("missing_field", "content")
    content = content_text(content, role)
    for key in turn.keys() - TURN_KEYS:
        if turn[key] not in (None, "", [], {}):
            conversion.notice(f"turns have '{key}', which is not read")
    if role == "assistant":
        content = with_reasoning(turn, content, conversion)
    if is_blank(content) and not calls:
        if role == "system":
            conversion.repair("empty_system_turn")
            return []
        raise Dropped("empty_field", "content")
    said = [*([] if is_blank(content) else [{"role": role, "content": content}]), *calls]
    return [{**each, "train": False} for each in said] if role == "assistant" and not is_trained(turn) else said


def one_of(turn: Row, keys: tuple[str, ...]) -> Any:
    """What stands under the first of the keys that the turn has. Raises `Dropped` if another says something else."""
    given = [turn[key] for key in keys if turn.get(key) is not None]
    if any(value != given[0] for value in given[1:]):
        raise Dropped("contradictory", " and ".join(key for key in keys if turn.get(key) is not None))
    return given[0] if given else None


def is_trained(turn: Row) -> bool:
    """Whether an assistant turn is to be learned from. Raises `Dropped` where it is to be in part, or says yes and no."""
    flags = {key: turn[key] for key in TRAIN_KEYS if turn.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float):
            raise Dropped("wrong_type", f"{key} is {type_name(value)}, not a number or truth value")
        if value not in (0, 1):
            raise Dropped("partial_weight", f"{key} is {value}")
    if len(set(map(bool, flags.values()))) > 1:
        raise Dropped("contradictory", ", ".join(f"{key} is {value}" for key, value in flags.items()))
    return all(flags.values())


def with_reasoning(turn: Row, content: str, conversion: Conversion) -> str:
    """The content after the turn's reasoning, which servers answer in a field of its own, in the marks most models write."""
    reasoning = one_of(turn, REASONING_KEYS)
    if reasoning is None:
        return content
    if not isinstance(reasoning, str):
        raise Dropped("wrong_type", f"the reasoning is {type_name(reasoning)}, not a text")
    if is_blank(reasoning):
        return content
    if "<think>" in content or "</think>" in content:
        raise Dropped("contradictory", "a turn has its reasoning in a field and within its content")
    conversion.repair("reasoning_joined")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"


def tool_calls(turn: Row) -> list[Any]:
    """What the turn asks tools to do, in any of the usual places."""
    if (calls := turn.get("tool_calls")) is None:
        calls = [turn[key] for key in ("function_call", "api") if turn.get(key) is not None]
    if not isinstance(calls, list):
        raise Dropped("wrong_type", f"tool_calls is {type_name(calls)}, not a list")
    return [
        with_arguments(call["function"] if isinstance(call, dict) and "function" in call else call) for call in calls
    ]


def with_arguments(call: Any) -> Any:
    """The call with its arguments as a mapping: OpenAI writes them as JSON text, and JSON within JSON is another call."""
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


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
            if merged[-1].get("train", True) != turn.get("train", True):
                raise Dropped("partial_weight", "what the assistant says in a row is to be trained on in part")
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n{content}"}
        else:
            merged.append({**turn, "role": role, "content": content})
        was_tool = is_tool
    return merged


TOOL_COLUMNS = ("tools", "functions")
"""`functions` is OpenAI's older name."""


def listed_tools(value: Any) -> Any:
    """The tools, or None where the column names none."""
    return None if isinstance(value, str) and value.strip() in ("", "[]", "null") else value or None


def system_text(row: Row) -> str:
    """The row's own system text and its tools, which a chat's system message must name."""
    parts = [text_of(row, "system", optional=True)]
    tools = one_of({name: listed_tools(row.get(name)) for name in TOOL_COLUMNS}, TOOL_COLUMNS)
    if tools:
        parts.append(f"<tools>\n{compact_json(tools)}\n</tools>")
    return "\n\n".join(part for part in parts if not is_blank(part))


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
        if is_blank(said):
            raise Dropped("empty_field", f"a turn of {speaker}")
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
    return turns
