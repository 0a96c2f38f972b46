"""Layouts of preference pairs."""

from __future__ import annotations

from typing import Any

from stages.lib.rows.canonical import Row, is_margin
from stages.lib.sources.conversion import Conversion, Dropped, is_blank, list_of, text_of
from stages.lib.sources.layouts_chats import alpaca_prompt
from stages.lib.sources.tool_turns import Message, merge_tool_turns, system_turn
from stages.lib.sources.turns import require_order, turns_or_text, with_system, without_train

# Preferences


def preference_alpaca(row: Row, conversion: Conversion) -> Row:
    """instruction, input and history with chosen and rejected, or with output as a list of answers, best first."""
    prompt = alpaca_prompt(row, conversion)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return preference(row, prompt, *(assistant(text_of(row, name)) for name in ("chosen", "rejected")))
    answers = list_of(row, "output")
    if not all(isinstance(answer, str) for answer in answers):
        raise Dropped("wrong_type", "output holds something else than texts")
    if len(answers) < 2:
        raise Dropped("one_answer")
    if is_blank(answers[0]) or is_blank(answers[-1]):
        raise Dropped("empty_field", "output")
    pair = preference(row, prompt, assistant(answers[0]), assistant(answers[-1]))
    conversion.repair("answers_between_best_and_worst", len(answers) - 2)
    return pair


def preference_chat(row: Row, conversion: Conversion) -> Row:
    """Chosen and rejected after a common prompt, or as two whole conversations (messages, or `Human:` transcripts)."""
    chosen, rejected = answer_turns(row, "chosen", conversion), answer_turns(row, "rejected", conversion)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        if chosen == rejected:
            raise Dropped("identical_pair")
        require_order(chosen)
        require_order(rejected)
        prompt, better, worse = split_at_difference(chosen, rejected)
        prompt = with_system(
            after_prompt(row, prompt, (better, worse), conversion), system_turn(row, conversion), conversion
        )
        return preference(row, prompt, *map(answer_in, (better, worse)))
    if len(chosen) != 1 or len(rejected) != 1 or chosen[0]["role"] != rejected[0]["role"]:
        raise Dropped("bad_turn_order", "chosen and rejected are neither one assistant turn nor whole conversations")
    prompt = prompt_in(row, conversion)
    return preference(row, prompt, *map(answer_in, (*chosen, *rejected)))


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def preference(row: Row, prompt: list[Message], chosen: Message, rejected: Message) -> Row:
    """The canonical row, with the raw row's `margin` where it has one."""
    if chosen == rejected:
        raise Dropped("identical_pair")
    margin = row.get("margin")
    if margin is not None and not is_margin(margin):
        raise Dropped("wrong_type", f"margin is {margin!r}, not a finite number of at least 0")
    return {
        "prompt": without_train(prompt),
        "chosen": [chosen],
        "rejected": [rejected],
        **({} if margin is None else {"margin": margin}),
    }


def prompt_in(row: Row, conversion: Conversion) -> list[Message]:
    """The messages before the answer: a text, or turns that end with the user's."""
    if row.get("messages") is None:
        hint = " (if chosen and rejected hold it as a transcript or as JSON, set turns_in_text)"
        raise Dropped("missing_field", "messages" + hint * (conversion.turns_in_text is None))
    turns = turns_or_text(row["messages"], "messages", "user", conversion)
    prompt = with_system(merge_tool_turns(turns, conversion), system_turn(row, conversion), conversion)
    start = 1 if prompt[0]["role"] == "system" else 0
    if len(prompt) > start + 1 and prompt[start]["role"] == "assistant":
        conversion.repair("opening_assistant_turn")
        del prompt[start]
    require_order(prompt)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("bad_turn_order", "the prompt does not end with the user's turn")
    return prompt


def after_prompt(
    row: Row, turns: list[Message], answers: tuple[Message, Message], conversion: Conversion
) -> list[Message]:
    """What whole conversations begin with, after the row's own prompt where that is no part of them already. Some data sets
    repeat one of the two conversations under `messages`: that is no prompt, and must not become one.
    """
    if row.get("messages") is None:
        return turns
    before = merge_tool_turns(turns_or_text(row["messages"], "messages", "user", conversion), conversion)
    if said(before) in (
        said(turns),
        said(turns[: len(before)]),
        said([turn for turn in turns if turn["role"] != "system"]),
        *(said([*turns, answer]) for answer in answers),
    ):
        return turns
    opening, spoken = before[: begins_with_system(before)], before[begins_with_system(before) :]
    if spoken and not begins_with_system(turns) and said(turns[: len(spoken)]) == said(spoken):
        return [*opening, *turns]
    if any(said(spoken[-count:]) == said(turns[:count]) for count in range(2, 1 + min(len(spoken), len(turns)))):
        raise Dropped("contradictory", "the end of the prompt is repeated at the beginning of chosen and rejected")
    together = [*before, *turns]
    try:
        require_order(together)
    except Dropped:
        what = "the prompt is neither what chosen and rejected begin with nor what can stand before them"
        raise Dropped("contradictory", what) from None
    return together


def begins_with_system(turns: list[Message]) -> bool:
    return bool(turns) and turns[0]["role"] == "system"


def said(turns: list[Message]) -> list[Message]:
    return [{**turn, "content": turn["content"].strip()} for turn in turns]


def answer_in(turn: Message) -> Message:
    """An answer of a pair. Raises `Dropped` if nothing is to be learned from it."""
    if not turn.get("train", True):
        raise Dropped("not_trained_on", "an answer of the pair")
    return turn


def answer_turns(row: Row, name: str, conversion: Conversion) -> list[Message]:
    """A text, a turn or a list of turns, as messages; a transcript where the source says so."""
    if row.get(name) is None:
        raise Dropped("missing_field", name)
    return merge_tool_turns(turns_or_text(row[name], name, "assistant", conversion), conversion)


def split_at_difference(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], Message, Message]:
    """(what both have in common, the last turn of each). They must differ in the last turn, an assistant's, only."""
    *prompt, last_chosen = chosen
    *other, last_rejected = rejected
    if prompt != other:
        asked = [[turn for turn in turns if turn["role"] != "assistant"] for turns in (chosen, rejected)]
        same_roles = [turn["role"] for turn in chosen] == [turn["role"] for turn in rejected]
        raise Dropped("several_answers_differ" if same_roles and asked[0] == asked[1] else "pair_differs_early")
    if not prompt or last_chosen["role"] != "assistant":
        raise Dropped("bad_turn_order", "the conversations do not end with the assistant's turn")
    return prompt, last_chosen, last_rejected


PROMPT_NAMES = ("messages", "conversations", "prompt")


def preference_turns(row: Row, conversion: Conversion) -> Row:
    """`preference_chat` with the prompt under any of its usual names: one that `columns` declares, or else what all of them say.

    Raises `Dropped` where two of them say different things.
    """
    names = [name for name in PROMPT_NAMES if row.get(name) not in (None, "", [])]
    if "messages" in conversion.declared:
        pair = preference_chat(row, conversion)
        for name in names:
            if row[name] != row.get("messages") and pair != pair_after(row, row[name], conversion):
                conversion.notice(
                    f"'{name}' says something else than the prompt that columns declares, and is not read"
                )
        return pair
    first = next(iter(names), next((name for name in PROMPT_NAMES if row.get(name) is not None), "messages"))
    pair = preference_chat({**row, "messages": row.get(first)}, conversion)
    for name in names[1:]:
        if row[name] != row[first] and pair != pair_after(row, row[name], conversion):
            raise Dropped("contradictory", f"{first} and {name} (columns: {{messages: ...}} says which is the prompt)")
    return pair


def pair_after(row: Row, prompt: Any, conversion: Conversion) -> Row | None:
    """The pair after another prompt, whose repairs and notices do not count; None where it cannot stand there."""
    try:
        return preference_chat({**row, "messages": prompt}, conversion.apart())
    except Dropped:
        return None
