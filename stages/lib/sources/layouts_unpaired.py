"""Layouts of single answers that people called desirable or not."""

from __future__ import annotations

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, truth_of
from stages.lib.sources.layouts_chats import RATINGS, alpaca_prompt, chat_of
from stages.lib.sources.layouts_preferences import answer_in, answer_turns, prompt_in
from stages.lib.sources.tool_turns import Message, system_turn
from stages.lib.sources.turns import with_system, without_train

CHAT_NAMES_OF_UNPAIRED = ("messages", "conversations")
PROMPT_NAMES_OF_UNPAIRED = ("prompt", *CHAT_NAMES_OF_UNPAIRED, "instruction")


def unpaired_preference(row: Row, conversion: Conversion) -> Row:
    """prompt, completion and label (TRL), as texts or turns; instruction, input and history in the place of the prompt; or a
    whole chat and its label, whose last turn is the completion.
    """
    desirable = truth_of(row, "label", RATINGS)
    if desirable is None:
        raise Dropped("missing_field", "label")
    if row.get("completion") is None:
        *prompt, completion = whole_chat(row, conversion)
    else:
        turns = answer_turns(row, "completion", conversion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise Dropped("bad_turn_order", "completion is not one assistant turn")
        prompt, (completion,) = prompt_before(row, conversion), turns
    return {"prompt": without_train(prompt), "completion": [answer_in(completion)], "label": desirable}


def whole_chat(row: Row, conversion: Conversion) -> list[Message]:
    """The chat of a row without a completion of its own: it ends with the assistant's turn, after another one."""
    names = [name for name in CHAT_NAMES_OF_UNPAIRED if row.get(name) is not None]
    if not names or row.get("prompt") is not None:
        raise Dropped("missing_field", "completion")
    chat = chat_of({**row, "messages": said_by_all(row, names)}, "messages", conversion)
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise Dropped("bad_turn_order", "the chat does not end with the assistant's turn")
    return chat


def prompt_before(row: Row, conversion: Conversion) -> list[Message]:
    """What a completion answers. Raises `Dropped` where two columns say different things."""
    names = [name for name in PROMPT_NAMES_OF_UNPAIRED if row.get(name) not in (None, "", [])]
    if names == ["instruction"]:
        return with_system(alpaca_prompt(row, conversion), system_turn(row, conversion), conversion)
    if not names:
        raise Dropped("missing_field", "prompt")
    if row.get("input") or row.get("history"):
        conversion.notice(f"rows have 'input' or 'history' beside '{names[0]}', which is not read")
    return prompt_in({**row, "messages": said_by_all(row, names)}, conversion)


def said_by_all(row: Row, names: list[str]) -> object:
    """What stands in the first of the columns. Raises `Dropped` if another one says something else."""
    if any(row[name] != row[names[0]] for name in names[1:]):
        raise Dropped("contradictory", " and ".join(names))
    return row[names[0]]
