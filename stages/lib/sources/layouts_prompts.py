"""Layouts of prompts: what a policy is asked, without an answer."""

from __future__ import annotations

from stages.lib.rows.canonical import Row
from stages.lib.sources.conversion import Conversion, Dropped, is_blank, text_of
from stages.lib.sources.layouts_chats import alpaca_prompt, history_pairs
from stages.lib.sources.tool_turns import Message, merge_tool_turns, system_turn
from stages.lib.sources.turns import require_order, turns_or_text, with_system, without_train


def prompts(row: Row, conversion: Conversion) -> Row:
    """`prompt` as a text or as turns that end with the user's (TRL, verl), or instruction and input; after the row's system
    text, tools and `history` of [question, answer] pairs.
    """
    if row.get("prompt") is None:
        if row.get("instruction") is None and row.get("input") is None:
            raise Dropped("missing_field", "prompt")
        return {"prompt": with_system(alpaca_prompt(row, conversion), system_turn(row, conversion), conversion)}
    if row.get("instruction") is not None:
        raise Dropped("contradictory", "prompt and instruction")
    if not is_blank(text_of(row, "input", optional=True)):
        conversion.notice("rows have 'input' beside 'prompt', which is not read")
    history: list[Message] = []
    for question, answer in history_pairs(row, conversion):
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = merge_tool_turns(turns_or_text(row["prompt"], "prompt", "user", conversion), conversion)
    has_system = bool(asked) and asked[0]["role"] == "system"
    turns = [*asked[:1], *history, *asked[1:]] if has_system else [*history, *asked]
    prompt = with_system(turns, system_turn(row, conversion), conversion)
    require_order(prompt)
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("bad_turn_order", "the prompt does not end with the user's turn")
    return {"prompt": without_train(prompt)}
