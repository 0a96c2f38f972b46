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
    listed = json_in(turn.get("tool_calls")) or []
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise Dropped("wrong_type", f"tool_calls is {type_name(listed)}, not a list")
    single = [json_in(turn[key]) for key in ("function_call", "api") if turn.get(key) not in (None, "", {})]
    if listed and single and [without_id(each) for each in listed] != [without_id(each) for each in single]:
        raise Dropped("contradictory", "tool_calls and function_call")
    return listed or single


def json_in(value: Any) -> Any:
    """What a text holds as JSON: tables without nested columns keep calls so. The value itself where it is no such text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


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
    for key in sorted({key for call in calls if isinstance(call, dict) and "function" in call for key in call}):
        if key not in CALL_FIELDS and any(call.get(key) for call in calls if isinstance(call, dict)):
            conversion.notice(f"calls of tools have '{key}', which is not read")
    if all(read):
        return {**message, "tool_calls": read}
    conversion.notice("calls of tools that have no name or no arguments by name were taken as text")
    return {**message, "content": in_text(message["content"], [with_arguments(call) for call in calls])}


def in_text(content: str, calls: list[Any]) -> str:
    """What the assistant says, and calls after it, as marked text."""
    marked = [f"<tool_call>\n{compact_json(call)}\n</tool_call>" for call in calls]
    return "\n".join(part for part in (content, *marked) if not is_blank(part))


ARGUMENT_KEYS = ("arguments", "parameters")
ID_KEYS = ("call_id", "id")
"""Of a call: the name in OpenAI's newer interface, where `id` is that of the item, and in its older one."""
CALL_FIELDS = frozenset({"function", "name", "type", "index", *ARGUMENT_KEYS, *ID_KEYS})


def as_call(call: Any) -> dict[str, Any] | None:
    """`{"name", "arguments"}`, the arguments by name; None if it is no such call. Both may stand in `function` or beside it.

    Raises `Dropped` if they stand in two places, and differ.
    """
    if not isinstance(call, dict):
        return None
    function = call.get("function")
    inner = {"name": function} if isinstance(function, str) else function if isinstance(function, dict) else call
    places = [with_arguments(inner), with_arguments(call)] if inner is not call else [with_arguments(call)]
    name = same_in(places, ("name",), "names")
    if not isinstance(name, str) or not name:
        return None
    arguments = same_in(places, ARGUMENT_KEYS, "arguments")
    arguments = {} if arguments is None else arguments
    known = inner.keys() <= {"name", "type", *ARGUMENT_KEYS, *ID_KEYS}
    identifier = next((place[key] for key in ID_KEYS for place in places if is_identifier(place.get(key))), None)
    named = {"name": name, "arguments": arguments}
    is_whole = isinstance(arguments, dict) and known and is_json(arguments)
    return (named if identifier is None else {**named, "id": str(identifier)}) if is_whole else None


def same_in(places: list[Row], keys: tuple[str, ...], what: str) -> Any:
    """What stands under the keys in the places, None where nothing does. Raises `Dropped` if it differs."""
    given = [place[key] for place in places for key in keys if place.get(key) not in (None, "")]
    if any(value != given[0] for value in given[1:]):
        raise Dropped("contradictory", f"a call has two {what} that differ")
    return given[0] if given else None


def is_identifier(value: Any) -> bool:
    return value != "" and isinstance(value, str | int)


def is_json(value: Any) -> bool:
    """Whether JSON can hold it: a source may say NaN, or dates, within an argument."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def with_arguments(call: Any) -> Any:
    """The call with its arguments as a mapping: OpenAI writes them as JSON text, some write that as JSON once more, and JSON
    within JSON is another call."""
    if not isinstance(call, dict):
        return call
    read = {key: json_in(json_in(call[key])) for key in ARGUMENT_KEYS if isinstance(call.get(key), str)}
    return {**call, **{key: value for key, value in read.items() if isinstance(value, dict)}}


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
            if calls:
                calls, messages = paired(calls, messages, conversion)
                ordered[-1] = {**ordered[-1], "tool_calls": calls}
            ordered += [without_call_id(each) for each in messages]
        else:
            ordered += [without_call_id(each) for each in messages] if is_tool else messages
    return [without_ids(turn) for turn in ordered]


def paired(calls: list[Row], answers: list[Message], conversion: Conversion) -> tuple[list[Row], list[Message]]:
    """The calls, those that are answered first, and the answers in their order: templates pair them by position.

    An answer that says which call it answers is of that call; others are of the calls that are left, in order, which is
    noticed where there are several. Raises `Dropped` where identifiers tell no call, or several.
    """
    if len(answers) > len(calls):
        raise Dropped("contradictory", f"{len(answers)} turns of tools follow upon {len(calls)} calls")
    if len(answers) < len(calls):
        conversion.notice("calls of tools that nothing answers")
    told = told_by_id(calls, answers)
    if len(told) < len(answers) and len(calls) > 1 and any("id" in call for call in calls):
        conversion.notice(
            "answers of tools that do not say which call they answer were taken in the order of the calls"
        )
    free = iter([place for place in range(len(calls)) if place not in told.values()])
    places = [told[index] if index in told else next(free) for index in range(len(answers))]
    for place, answer in zip(places, answers, strict=True):
        if answer.get("name", calls[place]["name"]) != calls[place]["name"]:
            what = f"a tool named {answer['name']} answers a call of {calls[place]['name']}"
            raise Dropped("contradictory", what)
    answered = sorted(places)
    if answered != list(range(len(answered))):
        conversion.notice("calls of tools that nothing answers were put behind those that are answered")
    unanswered = [place for place in range(len(calls)) if place not in places]
    in_order = [answers[places.index(place)] for place in answered]
    return [calls[place] for place in (*answered, *unanswered)], in_order


def told_by_id(calls: list[Row], answers: list[Message]) -> dict[int, int]:
    """Which answer is of which call, by position, as far as identifiers say it."""
    known = [call.get("id") for call in calls]
    asked = {index: answer["tool_call_id"] for index, answer in enumerate(answers) if "tool_call_id" in answer}
    if len(calls) == 1 and known == [None]:  # there is no other call that it could answer
        return dict.fromkeys(asked, 0)
    if len(set(asked.values())) < len(asked) or not set(asked.values()) <= set(known):
        raise Dropped("contradictory", "tool_call_id is that of no call, or of one that is answered already")
    if repeated := [each for each in asked.values() if known.count(each) > 1]:
        raise Dropped("contradictory", f"several calls have the identifier {repeated[0]}")
    return {index: known.index(each) for index, each in asked.items()}


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
    """The system text of a row, or of a system turn, and the tools that the assistant may call beside it."""
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
    return json_in(value) or None


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
