"""A rendered chat as ids, in one tokenization, as every server does it. What a message says is text, also where it spells a
special token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import Problem
from stages.lib.text.chat_rendering import Rendered
from stages.lib.text.chat_template import UnfitChat
from stages.lib.text.turn_marks import BREAK, marks_of, plain_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Ids, and the characters that each stands for."""


def tokenize(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> Tokens:
    """The ids of a rendered chat and the characters of its text that each stands for.

    Where a message spells special tokens, the stretches between those of the template are encoded one by one as plain text
    instead, once it is seen that this gives the same ids.
    """
    ids, offsets = tokenize_whole(tokenizer, rendered.text)
    if not rendered.guard:
        return ids, offsets
    if tokenize_stretches(tokenizer, Rendered(rendered.text, ""))[0] != ids:
        raise not_as_text("a message spells a special token, and this tokenizer cannot encode it as text")
    return tokenize_stretches(tokenizer, rendered)


class NotAsText(UnfitChat):
    """A message holds what this tokenizer cannot read as the text that it is."""

    reason = "not_as_text_for_tokenizer"


def not_as_text(what: str) -> NotAsText:
    hint = "Remove such rows in the cleaning stage, with a rule of the kind pattern."
    return NotAsText(Problem("chat", what, hint))


def tokenize_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"], [(start, end) for start, end in encoded["offset_mapping"]]


def tokenize_stretches(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, *, begins: bool = True) -> Tokens:
    """As `tokenize_whole`, stretch by stretch, and without the guard characters; the offsets still count them.

    `begins`: the text stands at the beginning of what the model reads. Elsewhere no tokenizer puts a space before it.
    """
    text, guard = rendered.text, rendered.guard
    if BREAK in text:
        raise not_as_text(f"a message holds the character {BREAK!r}, which no text should")
    plain, marks = plain_tokenizer(tokenizer), marks_of(tokenizer)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for match in [*marks.pattern.finditer(text), None]:
        start, end = match.span() if match else (len(text), len(text))
        token = marks.swallowing.get(match[0]) if match else None
        stretch = text[position:start]
        if token is not None and token.lstrip:
            stretch = stretch.rstrip()
        if token is not None and token.rstrip:
            end += len(text[end:]) - len(text[end:].lstrip())
        # Character of the text as it is encoded -> character of the guarded text.
        places = [position + place for place, character in enumerate(stretch) if not guard or character != guard]
        if places:
            before = "" if begins and not position else BREAK
            said = plain.encode(before + (stretch.replace(guard, "") if guard else stretch), add_special_tokens=False)
            shift = len(before)
            ids += said.ids[shift:]
            offsets += [
                (places[first - shift], places[last - shift - 1] + 1)
                if last > first
                else (places[min(first - shift, len(places) - 1)],) * 2
                for first, last in said.offsets[shift:]
            ]
        if match:
            ids.append(tokenizer.convert_tokens_to_ids(match[0]))
            offsets.append(match.span())
            position = end
    return ids, offsets


def ends_with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return text.endswith(marks_of(tokenizer).names)
