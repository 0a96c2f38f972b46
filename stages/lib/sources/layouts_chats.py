"""Layouts of chats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import (
    TRUTHS,
    Conversion,
    Dropped,
    Unusable,
    is_blank,
    items_of,
    one_of,
    text_of,
    truth_of,
    type_name,
)
from stages.lib.sources.tool_turns import Message, merge_tool_turns, system_turn
from stages.lib.sources.turns import require_order, turns_of, turns_or_text, with_system


def alpaca_rows(record: Row) -> Iterator[Row | Unusable]:
    """The record, or one row for each of its `instances`, which share the instruction (self-instruct's seed tasks)."""
    if record.get("instances") is None or (record["instances"] == [] and is_said(record, "output")):
        yield record
        return
    shared = {name: value for name, value in record.items() if name != "instances"}
    for instance in items_of(record, "instances"):
        if isinstance(instance, Unusable):
            yield instance
        elif said_twice := [name for name in ALPACA_COLUMNS if differs(shared, instance, name)]:
            what = f"instances beside the row's own {' and '.join(said_twice)}"
            yield Unusable({**shared, "instance": instance}, Dropped("contradictory", what))
        else:
            yield {**shared, **instance}


ALPACA_COLUMNS = ("instruction", "input", "output", "history", "system")


def is_said(row: Row, name: str) -> bool:
    value = row.get(name)
    return not (value in (None, [], {}) or (isinstance(value, str) and is_blank(value)))


def differs(shared: Row, instance: Row, name: str) -> bool:
    """Whether the record says one thing and its instance another: an answer of its own is that of no instance."""
    own = instance.get(name)
    return is_said(shared, name) and own != shared[name] and (own is not None or name == "output")


def alpaca(row: Row, conversion: Conversion) -> Row:
    """instruction, input and output, with an optional system text and `history` of [question, answer] pairs."""
    prompt = alpaca_prompt(row, conversion)
    return {"messages": [*prompt, {"role": "assistant", "content": text_of(row, "output")}]}


def alpaca_prompt(row: Row, conversion: Conversion) -> list[Message]:
    """Everything before the answer. The input stands below the instruction, a blank line between them."""
    instruction, given = text_of(row, "instruction", optional=True), text_of(row, "input", optional=True)
    if is_blank(instruction) and is_blank(given):
        raise Dropped("missing_field" if row.get("instruction") is None else "empty_field", "instruction")
    messages = []
    if not is_blank(system := text_of(row, "system", optional=True)):
        messages.append({"role": "system", "content": system})
    for question, answer in history_pairs(row, conversion):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = "\n\n".join(part for part in (instruction, given) if not is_blank(part))
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
        if is_blank(question) and is_blank(answer):
            conversion.repair("empty_history_pair")
        elif is_blank(question) or is_blank(answer):
            raise Dropped("bad_history", "a history pair has one empty text")
        else:
            yield question, answer


def messages(row: Row, conversion: Conversion) -> Row:
    """A list of turns: role and content, or ShareGPT's from and value; tool calls and tools stay apart from the text."""
    return {"messages": chat_of(row, "messages", conversion)}


RATINGS = {**TRUTHS, "good": True, "bad": False, "desirable": True, "undesirable": False}
"""How a rating may be written as a text."""


def rated_chat(row: Row, conversion: Conversion) -> Row:
    """A chat, or a context and an answer, that people rated: the good ones are kept as chats."""
    rating = truth_of(row, "label", RATINGS)
    if rating is None:
        raise Dropped("missing_field", "label")
    extra = turns_or_text(row["answer"], "answer", "assistant", conversion) if row.get("answer") is not None else []
    chat = chat_of(row, "messages", conversion, extra)
    if not rating:
        raise Dropped("rated_bad")
    return {"messages": chat}


def chat_of(row: Row, name: str, conversion: Conversion, extra: Iterable[Message] = ()) -> list[Message]:
    """The messages in a field, checked: an optional system text, then user and assistant in turn."""
    if row.get(name) is None:
        raise Dropped("missing_field", name)
    said = turns_or_text(row[name], name, "user", conversion) if extra else turns_of(row[name], name, conversion)
    chat = with_system(merge_tool_turns([*said, *extra], conversion), system_turn(row, conversion), conversion)
    start = 1 if chat and chat[0]["role"] == "system" else 0
    if len(chat) > start and chat[start]["role"] == "assistant":
        conversion.repair("opening_assistant_turn")
        del chat[start]
    # A last question that nobody answers stays: a policy is asked it, and nothing is learned from it.
    require_order(chat)
    if not any(message["role"] == "assistant" for message in chat):
        raise Dropped("no_assistant_turn")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in chat):
        raise Dropped("not_trained_on")
    return chat


CHAT_NAMES = ("messages", "conversations")


def sharegpt(row: Row, conversion: Conversion) -> Row:
    """ShareGPT's names: `conversations` of turns with `from` and `value`."""

    def said(turns: Any) -> list[Message]:
        return turns_of(turns, "conversations", conversion.apart())

    return messages({**row, "messages": one_of(row, CHAT_NAMES, said)}, conversion)
