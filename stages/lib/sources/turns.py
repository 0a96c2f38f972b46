"""The turns of a conversation from outside: who speaks and what they say, in the words that are in use."""

from __future__ import annotations

import re
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import TRUTHS, Conversion, Dropped, is_blank, one_of, text_of, type_name
from stages.lib.sources.strict_json import parse_json
from stages.lib.sources.tool_turns import (
    CALL_KEYS,
    TOOL_COLUMNS,
    Message,
    calls_in,
    compact_json,
    system_turn,
    tool_calls,
    with_calls,
)

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython", "api"), "tool"),
}
"""Names of roles in the wild -> ours."""


FOLLOWING = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""Whose turn may follow upon whose."""


def require_order(chat: list[Message]) -> None:
    """Raises `Dropped` unless the chat is an optional system text, then user and assistant in turn, tools after calls."""
    turns = chat[1:] if chat and chat[0]["role"] == "system" else chat
    before = ""
    for index, message in enumerate(turns):
        if message["role"] not in FOLLOWING.get(before, ()):
            raise Dropped("bad_turn_order", f"turn {index + 1} is the {message['role']}'s")
        before = message["role"]


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
        found = parse_json(value)
    except (ValueError, RecursionError):
        return None
    turns = found if isinstance(found, list) else [found]
    return found if turns and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns) else None


def turns_of(value: Any, name: str, conversion: Conversion) -> list[Message]:
    """The turns in a field: a list of them, one of them, or either as JSON text. Roles may still be tool_call."""
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
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
TRAIN_KEYS = ("weight", "loss_weight", "train", "training", "loss", "trainable", "loss_mask", "step_loss_mask")
"""Of OpenAI and Mistral, of others, of Axolotl (two), of ms-swift, of verl, and of slime (two): whether an assistant turn is to
be trained on.
"""
PARTLY_TRAINED_KEYS = ("train_detail", "training_detail")
"""Of Axolotl: which stretches of an assistant turn are to be trained on."""

ANSWERED_KEYS = ("tool_call_id", "call_id")
"""Which call a tool's turn answers: OpenAI's name, and that of its newer interface."""


def read_turn(turn: Any, conversion: Conversion) -> list[Message]:
    """One turn as a message; none for a system turn that says nothing."""
    if not isinstance(turn, dict):
        raise Dropped("wrong_type", f"a turn is {type_name(turn)}, not a mapping")
    role = one_of(turn, ROLE_KEYS, role_of)
    if role is None:
        raise Dropped("missing_field", "role")
    if (role := role_of(role)) not in ROLES.values():
        raise Dropped("unknown_role", repr(role))
    says = role in ("assistant", "tool_call")
    content, calls = one_of(turn, CONTENT_KEYS), tool_calls(turn) if says else []
    may_say_nothing = role == "system" or (role == "tool" and any(key in turn for key in CONTENT_KEYS))
    if content is None and not calls and not may_say_nothing:
        raise Dropped("missing_field", "content")
    if says and any(turn.get(key) for key in PARTLY_TRAINED_KEYS):
        raise Dropped("partial_weight", "only stretches of its content are to be trained on")
    notice_unread(turn, role, conversion)
    message: Message = {"role": role, "content": content_text(content, role, conversion)}
    if role == "tool_call":
        message = {"role": role, "content": "", **calls_in(message["content"], conversion)}
    elif calls:
        message = with_calls(message, calls, conversion)
    if role == "system":
        message = system_turn({**turn, "system": message["content"]}, conversion)
    if role == "tool":
        named = {"name": turn.get("name"), "tool_call_id": one_of(turn, ANSWERED_KEYS)}
        message |= {key: str(value) for key, value in named.items() if value not in (None, "")}
    if role == "assistant":
        message |= reasoning_in(turn, message["content"])
        if message["content"].lstrip().startswith("<think>") and "</think>" not in message["content"]:
            conversion.notice(
                "turns of the assistant begin with '<think>' and say no '</think>': all of it is the answer"
            )
    # A tool may return nothing: that is what it returned.
    if is_blank(message["content"]) and not message.keys() & {"tool_calls", "tools"} and role != "tool":
        if role == "system":
            conversion.repair("empty_system_turn")
            return []
        raise Dropped("empty_field", "content")
    if says and not is_trained(turn, content):
        message["train"] = False
    return [message]


def role_of(given: Any) -> Any:
    """Our name of a role; one that we do not know as it is."""
    return ROLES.get(given.lower(), given) if isinstance(given, str) else given


def notice_unread(turn: Row, role: str, conversion: Conversion) -> None:
    of_role = {
        "system": TOOL_COLUMNS,
        "tool": ("name", *ANSWERED_KEYS),
        "assistant": (*CALL_KEYS, *REASONING_KEYS),
        "tool_call": (*CALL_KEYS, *REASONING_KEYS),
    }
    if role not in ("assistant", "tool_call"):
        # That a turn of somebody else is not trained on goes without saying; that it is to be does not.
        for key in TRAIN_KEYS:
            if turn.get(key) not in (None, "") and TRUTHS.get(str(turn[key]).lower()) is not False:
                conversion.notice(f"turns of the {role} are to be trained on by their '{key}', which is not done")
    read = {*ROLE_KEYS, *CONTENT_KEYS, *TRAIN_KEYS, *of_role.get(role, ())}
    for key in sorted(turn.keys() - read):
        if turn[key] not in (None, "", [], {}):
            conversion.notice(f"turns have '{key}', which is not read")


def is_trained(turn: Row, content: Any) -> bool:
    """Whether an assistant turn is to be learned from, by its own word and by that of its parts. Raises `Dropped` where it is
    to be in part, or says yes and no.
    """
    whole = flag_of(turn)
    if not is_list_of_parts(content) or not content:
        return whole is not False
    parts = {flag_of(part) for part in content}
    if len(parts) > 1 and False in parts:
        raise Dropped("partial_weight", "some parts of its content are to be trained on, and some are not")
    if whole is not None and not parts <= {whole, None}:
        raise Dropped("contradictory", "a turn says of itself and of its parts whether they are to be trained on")
    return whole is not False and False not in parts


def flag_of(turn: Row) -> bool | None:
    """Whether a turn, or a part of one, says that it is to be trained on; None where it says nothing."""
    flags = {key: turn[key] for key in TRAIN_KEYS if turn.get(key) is not None}
    read = set()
    for key, value in flags.items():
        if isinstance(value, str) and value.strip().lower() in TRUTHS:
            value = TRUTHS[value.strip().lower()]
        if not isinstance(value, bool | int | float):
            raise Dropped("wrong_type", f"{key} is {type_name(value)}, not a number or truth value")
        if value not in (0, 1):
            raise Dropped("partial_weight", f"{key} is {value}")
        read.add(bool(value))
    if len(read) > 1:
        raise Dropped("contradictory", ", ".join(f"{key} is {value}" for key, value in flags.items()))
    return read.pop() if read else None


def reasoning_in(turn: Row, content: str) -> Message:
    """The turn's reasoning, which servers answer in a field of its own, as that field of the message; nothing if it has none."""
    reasoning = one_of(turn, REASONING_KEYS)
    if reasoning is None:
        return {}
    if not isinstance(reasoning, str):
        raise Dropped("wrong_type", f"the reasoning is {type_name(reasoning)}, not a text")
    if is_blank(reasoning):
        return {}
    if "<think>" in content or "</think>" in content:
        raise Dropped("contradictory", "a turn has its reasoning in a field and within its content")
    return {"reasoning_content": reasoning.strip()}


def content_text(content: Any, role: str, conversion: Conversion) -> str:
    """The text of a turn: a text, a list of text parts, or what a tool returned, as JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if role in ("tool_call", "tool") and not is_list_of_parts(content):
        return compact_json(content)
    if not isinstance(content, list):
        raise Dropped("wrong_type", f"content is {type_name(content)}, not a text")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise Dropped("wrong_type", f"a part of content is {type_name(part)}, not a mapping")
        if part.get("type") != "text":
            raise Dropped("not_text", f"a part is of type {part.get('type')!r}")
        if (said := one_of(part, PART_KEYS)) is None:
            raise Dropped("missing_field", "the text of a part of content")
        texts.append(text_of({"text": said}, "text", optional=True))
        notice_unread_of_part(part, role, conversion)
    return "".join(texts)


PART_KEYS = ("text", "value")


def notice_unread_of_part(part: Row, role: str, conversion: Conversion) -> None:
    flags = TRAIN_KEYS if role in ("assistant", "tool_call") else ()
    for key in sorted(part.keys() - {"type", *PART_KEYS, *flags}):
        if part[key] not in (None, "", [], {}) and not (key in TRAIN_KEYS and not part[key]):
            conversion.notice(f"parts of turns of the {role} have '{key}', which is not read")


def is_list_of_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def with_system(chat: list[Message], system: Message, conversion: Conversion) -> list[Message]:
    """The chat with what `system` says before whatever system text it starts with, unless that is the same."""
    if not system["content"] and "tools" not in system:
        return chat
    if chat and chat[0]["role"] == "system":
        said = [part for part in dict.fromkeys((system["content"], chat[0]["content"])) if part]
        if len(said) > 1:
            conversion.notice("a row's own system text was put before that of its chat")
        if "tools" in system and chat[0].get("tools", system["tools"]) != system["tools"]:
            raise Dropped("contradictory", "the tools of the row and of its system turn")
        return [{**chat[0], **system, "content": "\n\n".join(said)}, *chat[1:]]
    return [system, *chat]


def without_train(chat: list[Message]) -> list[Message]:
    """The messages of a prompt, from which nothing is learned whatever they say of it."""
    return [{key: value for key, value in message.items() if key != "train"} for message in chat]


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
