"""Converters of chats and preferences: alpaca, ShareGPT, messages, tool calls, ratings, pairs and transcripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from stages.lib.conversion import Conversion, Dropped, list_of, text_of, type_name
from stages.lib.rows import Row, is_margin

Message = dict[str, str]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython", "api"), "tool_response"),
}
"""Names of roles in the wild -> ours. Tool calls and responses become marked text of the assistant and of the user."""


def alpaca(row: Row, conversion: Conversion) -> Row:
    """instruction, input and output, with an optional system text and `history` of [question, answer] pairs."""
    prompt = alpaca_prompt(row, conversion)
    return {"messages": [*prompt, {"role": "assistant", "content": text_of(row, "output")}]}


def alpaca_prompt(row: Row, conversion: Conversion) -> list[Message]:
    """Everything before the answer. The input stands below the instruction, a blank line between them."""
    instruction, given = text_of(row, "instruction", optional=True), text_of(row, "input", optional=True)
    if not (instruction.strip() or given.strip()):
        raise Dropped("missing_field" if row.get("instruction") is None else "empty_field", "instruction")
    messages = []
    if (system := text_of(row, "system", optional=True)).strip():
        messages.append({"role": "system", "content": system})
    for question, answer in history_pairs(row, conversion):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = "\n\n".join(part for part in (instruction, given) if part.strip())
    return [*messages, {"role": "user", "content": content}]


def history_pairs(row: Row, conversion: Conversion) -> Iterator[tuple[str, str]]:
    """The earlier turns. Pairs of two empty texts are padding: they are left out and counted."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Dropped("wrong_type", f"history is {type_name(history)}, not a list of pairs")
    for pair in history:
        if not isinstance(pair, list) or not all(isinstance(side, str) for side in pair):
            raise Dropped("wrong_type", "history holds something else than pairs of texts")
        if len(pair) != 2:
            raise Dropped("bad_history", f"a history pair has {len(pair)} texts")
        question, answer = pair
        if not question.strip() and not answer.strip():
            conversion.repair("empty_history_pair")
        elif not question.strip() or not answer.strip():
            raise Dropped("bad_history", "a history pair has one empty text")
        else:
            yield question, answer


def messages(row: Row, conversion: Conversion) -> Row:
    """A list of turns: role and content, or ShareGPT's from and value; tool calls and tools become marked text."""
    return {"messages": chat_of(row, "messages", conversion)}


def rated_chat(row: Row, conversion: Conversion) -> Row:
    """A chat, or a context and an answer, that people rated: the good ones are kept as chats."""
    rating = row.get("label")
    if rating is None:
        raise Dropped("missing_field", "label")
    if not isinstance(rating, bool | int | float) or rating not in (0, 1):
        raise Dropped("wrong_type", f"label is {rating!r}, neither true nor false")
    extra = turns_or_text(row["answer"], "answer", "assistant") if row.get("answer") is not None else []
    chat = chat_of(row, "messages", conversion, extra)
    if not rating:
        raise Dropped("rated_bad")
    return {"messages": chat}


def chat_of(row: Row, name: str, conversion: Conversion, extra: Iterable[Message] = ()) -> list[Message]:
    """The messages in a field, checked: an optional system text, then user and assistant in turn."""
    if row.get(name) is None:
        raise Dropped("missing_field", name)
    turns = [*(turns_or_text(row[name], name, "user") if extra else turns_of(row[name], name)), *extra]
    chat = with_system(merge_tool_turns(turns), system_text(row))
    start = 1 if chat and chat[0]["role"] == "system" else 0
    if len(chat) > start and chat[start]["role"] == "assistant":
        conversion.repair("opening_assistant_turn")
        del chat[start]
    if len(chat) > start and chat[-1]["role"] == "user":
        if not any(message["role"] == "assistant" for message in chat):
            raise Dropped("no_assistant_turn")
        conversion.repair("trailing_user_turn")
        chat.pop()
    require_order(chat)
    if len(chat) == start:
        raise Dropped("no_assistant_turn")
    return chat


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


def sharegpt(row: Row, conversion: Conversion) -> Row:
    """ShareGPT's names: `conversations` of turns with `from` and `value`."""
    return messages({**row, "messages": row.get("messages", row.get("conversations"))}, conversion)


# Preferences


def preference_alpaca(row: Row, conversion: Conversion) -> Row:
    """instruction, input and history with chosen and rejected, or with output as a list of answers, best first."""
    prompt = alpaca_prompt(row, conversion)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return preference(row, prompt, text_of(row, "chosen"), text_of(row, "rejected"))
    answers = list_of(row, "output")
    if not all(isinstance(answer, str) for answer in answers):
        raise Dropped("wrong_type", "output holds something else than texts")
    if len(answers) < 2:
        raise Dropped("one_answer")
    if not (answers[0].strip() and answers[-1].strip()):
        raise Dropped("empty_field", "output")
    pair = preference(row, prompt, answers[0], answers[-1])
    conversion.repair("answers_between_best_and_worst", len(answers) - 2)
    return pair


def preference_chat(row: Row, conversion: Conversion) -> Row:
    """Chosen and rejected after a common prompt, or as two whole conversations (messages, or `Human:` transcripts)."""
    chosen, rejected = answer_turns(row, "chosen"), answer_turns(row, "rejected")
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        if chosen == rejected:
            raise Dropped("identical_pair")
        require_order(chosen)
        require_order(rejected)
        prompt, better, worse = split_at_difference(chosen, rejected)
        return preference(row, with_system(prompt, system_text(row)), better["content"], worse["content"])
    if len(chosen) != 1 or len(rejected) != 1 or chosen[0]["role"] != rejected[0]["role"]:
        raise Dropped("bad_turn_order", "chosen and rejected are neither one assistant turn nor whole conversations")
    prompt = prompt_of(row, conversion)
    return preference(row, prompt, chosen[0]["content"], rejected[0]["content"])


def preference(row: Row, prompt: list[Message], chosen: str, rejected: str) -> Row:
    """The canonical row, with the raw row's `margin` where it has one."""
    if chosen == rejected:
        raise Dropped("identical_pair")
    margin = row.get("margin")
    if margin is not None and not is_margin(margin):
        raise Dropped("wrong_type", f"margin is {margin!r}, not a finite number of at least 0")
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **({} if margin is None else {"margin": margin}),
    }


def prompt_of(row: Row, conversion: Conversion) -> list[Message]:
    """The messages before the answer: a text, or turns that end with the user's."""
    if row.get("messages") is None:
        raise Dropped("missing_field", "messages")
    turns = turns_or_text(row["messages"], "messages", "user")
    prompt = with_system(merge_tool_turns(turns), system_text(row))
    start = 1 if prompt[0]["role"] == "system" else 0
    if len(prompt) > start + 1 and prompt[start]["role"] == "assistant":
        conversion.repair("opening_assistant_turn")
        del prompt[start]
    require_order(prompt)
    if prompt[-1]["role"] != "user":
        raise Dropped("bad_turn_order", "the prompt does not end with the user's turn")
    return prompt


def answer_turns(row: Row, name: str) -> list[Message]:
    """A text, a turn, a list of turns or a transcript, as messages."""
    if row.get(name) is None:
        raise Dropped("missing_field", name)
    return merge_tool_turns(turns_or_text(row[name], name, "assistant"))


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


def split_at_difference(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], Message, Message]:
    """(what both have in common, the last turn of each). They must differ in the last turn, an assistant's, only."""
    *prompt, last_chosen = chosen
    *other, last_rejected = rejected
    if prompt != other:
        raise Dropped("pair_differs_early")
    if not prompt or last_chosen["role"] != "assistant":
        raise Dropped("bad_turn_order", "the conversations do not end with the assistant's turn")
    return prompt, last_chosen, last_rejected


def preference_turns(row: Row, conversion: Conversion) -> Row:
    """`preference_chat` with the prompt under any of its usual names."""
    prompt = next((row[name] for name in ("messages", "conversations", "prompt") if row.get(name) is not None), None)
    return preference_chat({**row, "messages": prompt}, conversion)
