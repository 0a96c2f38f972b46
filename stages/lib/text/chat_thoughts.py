"""Thoughts within what an assistant says: set apart where they begin it, named where they stand elsewhere.

As the reasoning parsers of servers do: what stands before a `</think>` that nothing opens is the thought, because the prompt
of many models ends in `<think>`, and only the end of the thought is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from stages.lib.text.chat_dialect import ASKED, REPLY, THINKING, THOUGHT_MARKS, WITHIN_CONTENT, dialect_of, written_as
from stages.lib.text.chat_template import TemplateMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING, CLOSING = re.compile(r"\s*<think>"), re.compile(r"</think>\s*")

QUOTES = "`'\""
"""A closing mark between two of them is spoken of, and ends nothing."""

ANY_MARK = (
    r"(?i:<\s*/?\s*(?:\w+[:_-])?(?:ant)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)(?:[_-]\w+)?"
    r"(?:\s+\w+=[^<>]*)?\s*/?>)"
    r"|(?i:<\|channel\|?>\s*(?:analysis|thought|thinking))"
    r"|(?i:<\|[^<>|]*(?:think|thought|reasoning)[^<>|]*\|>)"
    r"|\[/?THINK(?:ING)?\]"
    "|\u25c1/?think\u25b7"
)
"""What models are known to write around thoughts: those of Qwen, Seed, Cohere, gpt-oss, Mistral, Kimi and others."""


class Thought(NamedTuple):
    """A content in four pieces: the thought at its beginning, what stands around that, and the rest."""

    before: str
    """The opening mark; "" where the prompt has it."""
    thought: str
    after: str
    rest: str


def thought_within(content: str) -> Thought | None:
    """The thought with which the content begins, or None."""
    opened = OPENING.match(content)
    start = opened.end() if opened else 0
    closed = CLOSING.search(content, start)
    if not closed or (not opened and ("<think>" in content[: closed.start()] or is_quoted(content, closed.start()))):
        return None
    return Thought(content[:start], content[start : closed.start()], closed[0], content[closed.end() :])


def is_quoted(content: str, start: int) -> bool:
    """Whether the closing mark at `start` stands between two quotes, or in its line within a piece of code."""
    before, after = content[max(start - 1, 0) : start], content[start + len("</think>") :][:1]
    line = content[content.rfind("\n", 0, start) + 1 : start]
    in_code = line.replace("```", "").count("`") % 2 == 1
    return in_code or (bool(before) and before == after and before in QUOTES)


def thought_apart(message: Mapping[str, Any]) -> TemplateMessage:
    """The message, with a thought at the beginning of its content as `reasoning_content`, and what stood around it."""
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return dict(message)
    if (found := thought_within(message["content"])) is None:
        return dict(message)
    if not found.thought.strip():  # its marks alone, which most templates write themselves
        return {**message, "content": found.rest, THOUGHT_MARKS: (found.before, found.thought + found.after)}
    marks = (found.before, found.after)
    return {**message, "content": found.rest, "reasoning_content": found.thought, THOUGHT_MARKS: marks}


def without_thought(message: Mapping[str, Any]) -> TemplateMessage:
    """The message without what it thinks before it answers, and without the marks of an empty thought."""
    return {key: value for key, value in thought_apart(message).items() if key not in LOST_WITH_THOUGHT}


LOST_WITH_THOUGHT = ("reasoning_content", THOUGHT_MARKS)


def is_unopened(message: Mapping[str, Any]) -> bool:
    """Whether the message says the end of a thought and not its beginning."""
    return thought_apart(message).get(THOUGHT_MARKS, ("<think>",))[0] == ""


def mark_left(tokenizer: PreTrainedTokenizerBase, message: Mapping[str, Any]) -> str:
    """The first mark of a thought in what the message says after the thought that it begins with; "" if there is none."""
    found = marks_pattern(tokenizer).search(without_thought(message)["content"])
    return found[0] if found else ""


KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, re.Pattern[str]]] = WeakKeyDictionary()


def marks_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches marks of thoughts, those of the template among them; found once per template."""
    known = KNOWN.get(tokenizer)
    if known is None or known[0] != str(tokenizer.chat_template):
        own = [re.escape(mark) for mark in own_marks(tokenizer)]
        known = KNOWN[tokenizer] = (str(tokenizer.chat_template), re.compile("|".join([*own, ANY_MARK])))
    return known[1]


def own_marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the template itself writes before and after a thought that it is given in a field."""
    dialect = dialect_of(tokenizer)
    if dialect.reasoning in ("", WITHIN_CONTENT):
        return []
    answer = {"role": "assistant", "content": REPLY, "reasoning_content": THINKING}
    prompt = written_as(tokenizer, [ASKED], dialect, add_generation_prompt=True)
    before, _, rest = written_as(tokenizer, [ASKED, answer], dialect).partition(THINKING)
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    marks = opening.strip(), rest.partition(REPLY)[0].strip()
    # A word alone, or a line of dashes, stands in many an answer.
    return [mark for mark in marks if re.search(r"[^\w\s]", mark) and re.search(r"\w", mark)]
