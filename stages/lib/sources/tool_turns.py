"""What the assistant asks tools to do, what they are, and how both are written in data from outside."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, is_blank, one_of, text_of, type_name
from stages.lib.sources.strict_json import parse_json

Message = dict[str, Any]
"""A canonical message: `stages/lib/rows/canonical.py` says what it holds. While a chat is read, its role may be `tool_call`."""

CALL_KEYS = ("tool_calls", "function_call", "api")


def tool_calls(turn: Row) -> list[Any]:
    """What the turn asks tools to do, in any of the usual places. Raises `Dropped` if two of them say different things."""
    listed = turn.get("tool_calls") or []
    if not isinstance(listed, list):
        raise Dropped("wrong_type", f"tool_calls is {type_name(listed)}, not a list")
    single = [turn[key] for key in ("function_call", "api") if turn.get(key) not in (None, "", {})]
    if listed and single and [without_id(each) for each in listed] != [without_id(each) for each in single]:
        raise Dropped("contradictory", "tool_calls and function_call")
    return listed or single


def without_id(call: Any) -> Any:
    """What a call asks for, whatever number it carries; the call itself where it is none that we know."""
    read = as_call(call)
    return call if read is None else {key: value for key, value in read.items() if key != "id"}


def calls_in(content: str, conversion: Conversion) -> Message:
    """The calls that a turn of their own holds as JSON: one, or a list of them."""
    try:
        found = parse_json(content)
    except (ValueError, RecursionError):
        found = content
    calls = found if isinstance(found, list) else [found]
    return with_calls({"content": ""}, calls or [content], conversion)


def with_calls(message: Message, calls: list[Any], conversion: Conversion) -> Message:
    """The message with its calls, each a name and a mapping of arguments; as marked text where one of them is none."""
    read = [as_call(call) for call in calls]
    if all(read):
        return {**message, "tool_calls": read}
    conversion.notice("calls of tools that have no name or no arguments by name were taken as text")
    return {**message, "content": in_text(message["content"], [with_arguments(call) for call in calls])}


def in_text(content: str, calls: list[Any]) -> str:
    """What the assistant says, and calls after it, as marked text."""
    marked = [f"<tool_call>\n{compact_json(call)}\n</tool_call>" for call in calls]
    return "\n".join(part for part in (content, *marked) if not is_blank(part))


def as_call(call: Any) -> dict[str, Any] | None:
    """`{"name", "arguments"}`, the arguments by name; None if it is no such call."""
    inner = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    inner = with_arguments(inner)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        return None
    given = [inner[name] for name in ("arguments", "parameters") if inner.get(name) not in (None, "")]
    if len(given) == 2 and given[0] != given[1]:
        raise Dropped("contradictory", "arguments and parameters of a call")
    arguments = given[0] if given else {}
    known = inner.keys() <= {"name", "arguments", "parameters", "id", "type"}
    is_whole = isinstance(arguments, dict) and known and is_json(arguments)
    identifier = next((each["id"] for each in (call, inner) if isinstance(each.get("id"), str | int)), None)
    named = {"name": inner["name"], "arguments": arguments}
    return (named if identifier is None else {**named, "id": str(identifier)}) if is_whole else None


def is_json(value: Any) -> bool:
    """Whether JSON can hold it: a source may say NaN, or dates, within an argument."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def with_arguments(call: Any) -> Any:
    """The call with its arguments as a mapping: OpenAI writes them as JSON text, and JSON within JSON is another call."""
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = parse_json(call["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def compact_json(value: Any) -> str:
    """JSON as text; a text is taken to be JSON already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def merge_tool_turns(turns: list[Message], conversion: Conversion) -> list[Message]:
    """The turns with calls as the assistant's, what it says and calls in a row as one message, and what tools return in the
    order of the calls.
    """
    merged: list[Message] = []
    for turn in turns:
        is_call = turn["role"] == "tool_call"
        turn = {**turn, "role": "assistant"} if is_call else turn
        before = merged[-1] if merged else {}
        if not before or before["role"] != turn["role"] or not (is_call or "tool_calls" in before):
            merged.append(turn)
            continue
        if before.get("train", True) != turn.get("train", True):
            raise Dropped("partial_weight", "what the assistant says in a row is to be trained on in part")
        merged[-1] = said_and_called(before, turn)
    return with_answers_in_order(merged, conversion)


def said_and_called(before: Message, after: Message) -> Message:
    """Two messages of the assistant as one. What is said after a call leaves the calls before it as text."""
    calls = before.get("tool_calls", [])
    thoughts = [each["reasoning_content"] for each in (before, after) if "reasoning_content" in each]
    together = {**before, **after, **({"reasoning_content": "\n\n".join(thoughts)} if thoughts else {})}
    if not after["content"]:
        listed = [*calls, *after.get("tool_calls", [])]
        return {**together, "content": before["content"], "tool_calls": listed}
    said = in_text(before["content"], [without_id(call) for call in calls])
    content = "\n".join(part for part in (said, after["content"]) if part)
    together = {**together, "content": content}
    return together if "tool_calls" in after else without_calls(together, content)


def with_answers_in_order(turns: list[Message], conversion: Conversion) -> list[Message]:
    """The turns, what tools return in the order of the calls that it answers. Raises `Dropped` where it answers none."""
    ordered: list[Message] = []
    for is_tool, group in groupby(turns, key=lambda turn: turn["role"] == "tool"):
        messages = list(group)
        if is_tool and ordered:
            calls = ordered[-1].get("tool_calls", [])
            if not calls:
                conversion.notice("turns of tools follow upon turns that call none")
            ordered += (
                in_order_of(calls, messages, conversion) if calls else [without_call_id(each) for each in messages]
            )
        else:
            ordered += [without_call_id(each) for each in messages] if is_tool else messages
    return [without_ids(turn) for turn in ordered]


def in_order_of(calls: list[Any], answers: list[Message], conversion: Conversion) -> list[Message]:
    """The answers in the order of the calls, told by identifiers where both have such."""
    if len(answers) > len(calls):
        raise Dropped("contradictory", f"{len(answers)} turns of tools follow upon {len(calls)} calls")
    if len(answers) < len(calls):
        conversion.notice("calls of tools that nothing answers")
    known = [call.get("id") for call in calls]
    asked = [answer.get("tool_call_id") for answer in answers]
    if all(asked) and all(known) and len(set(known)) == len(known):
        if len(set(asked)) < len(asked) or not set(asked) <= set(known):
            raise Dropped("contradictory", "tool_call_id is that of no call, or of one that is answered already")
        answers = sorted(answers, key=lambda answer: known.index(answer["tool_call_id"]))
        calls = [call for call in calls if call["id"] in asked]
    for call, answer in zip(calls, answers, strict=False):
        if answer.get("name", call["name"]) != call["name"]:
            raise Dropped("contradictory", f"a tool named {answer['name']} answers a call of {call['name']}")
    return [without_call_id(answer) for answer in answers]


def without_call_id(answer: Message) -> Message:
    return {key: value for key, value in answer.items() if key != "tool_call_id"}


def without_ids(turn: Message) -> Message:
    """The turn without the identifiers of its calls: templates get numbers of our own."""
    if "tool_calls" not in turn:
        return turn
    return {**turn, "tool_calls": [without_id(call) for call in turn["tool_calls"]]}


def without_calls(message: Message, content: str) -> Message:
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


TOOL_COLUMNS = ("tools", "functions")
"""`functions` is OpenAI's older name."""


def system_turn(row: Row, conversion: Conversion) -> Message:
    """The row's own system text, and the tools that the assistant may call beside it."""
    listed = one_of({name: named_tools(row.get(name)) for name in TOOL_COLUMNS}, TOOL_COLUMNS)
    said, tools = text_of(row, "system", optional=True), None if listed is None else as_tools(listed)
    content = "" if is_blank(said) else said
    if listed is not None and tools is None:
        conversion.notice("tools that are no list of functions with names were taken as text")
        marked = f"<tools>\n{compact_json(listed)}\n</tools>"
        content = "\n\n".join(part for part in (content, marked) if not is_blank(part))
    return {"role": "system", "content": content, **({"tools": tools} if tools else {})}


def named_tools(value: Any) -> Any:
    """The tools in a column, JSON text read; None where it names none."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except (ValueError, RecursionError):
            return value
    return value or None


def as_tools(listed: Any) -> list[Any] | None:
    """The tools as OpenAI lists them, each a function with a name; None if these are none."""
    tools = [
        tool
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
        else {"type": "function", "function": tool}
        for tool in (listed if isinstance(listed, list) else [listed])
    ]
    functions = [tool["function"] for tool in tools]
    is_named = all(isinstance(each, dict) and isinstance(each.get("name"), str) and each["name"] for each in functions)
    return tools if is_named and is_json(tools) else None
