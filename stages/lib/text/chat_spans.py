"""Chats as tokens, and which of them the assistant says.

The ids of a chat come from one tokenization of its rendered text, and what the assistant says is found as a range of
characters in that text: tokens are never glued together from separately encoded turns. What a message says is text,
also where it spells a special token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_rendering import (
    Messages,
    Rendered,
    about,
    apply_template,
    guard_special,
    is_learned,
    render,
    special_pattern,
    special_tokens,
)
from stages.lib.text.turn_marks import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BoundaryError(DataError):
    """In training the tokens before an answer would be others than those of the prompt that asks for it."""


class EncodedChat(NamedTuple):
    """A chat as tokens: the ids, and 1 for each token of an assistant turn including the one that ends it, else 0."""

    input_ids: list[int]
    assistant_mask: list[int]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, mask_from: int = 0) -> EncodedChat:
    """The ids of the whole chat, and a mask over the assistant's turns from message `mask_from` on that are to be learned.

    A turn's mask covers its content and the special token that ends it, not its header. The tokens before each answer
    are exactly those of the prompt that `encode_prompt` makes for it. Raises `BoundaryError` where the tokenizer cannot
    give both, and `DataError` where the template does not say which part the assistant says.
    """
    chat = render_spans(tokenizer, messages)
    ids, offsets = tokenize(tokenizer, chat.rendered)
    mask = [0] * len(ids)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, (start, end) in zip(turns, chat.spans, strict=True):
        first = next(token for token, (_, stop) in enumerate(offsets) if stop > start)
        after = next((token for token, (begin, _) in enumerate(offsets) if begin >= end), len(ids))
        if offsets[first][0] < start or offsets[after - 1][1] > end:
            raise boundary_error(tokenizer, messages, ids[first])
        # Between special tokens a text is encoded by itself; elsewhere what follows can change what stands before.
        header = chat.rendered.upto(start)
        if not ends_with_special(tokenizer, header.text) and tokenize(tokenizer, header)[0] != ids[:first]:
            raise boundary_error(tokenizer, messages, ids[first])
        if index >= mask_from and is_learned(messages[index]):
            mask[first:after] = [1] * (after - first)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError(
            Problem(
                about(messages),
                f"begins with {tokenizer.bos_token} twice",
                "The chat template must write it once, and nothing else may.",
            )
        )
    return EncodedChat(ids, mask)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids of the chat so far and the header of the assistant's next turn: what a model is asked with."""
    return tokenize(tokenizer, render(tokenizer, messages, add_generation_prompt=True))[0]


@dataclass(frozen=True)
class RenderedSpans:
    """A rendered chat, and for each assistant turn the characters from its content to the end of its last token."""

    rendered: Rendered
    spans: list[tuple[int, int]]


def render_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> RenderedSpans:
    """The rendered chat and its assistant spans, from the template's generation blocks or from rendering prefixes."""
    guarded, guard = guard_special(tokenizer, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    text, spans = apply_template(tokenizer, guarded)
    if spans is None:
        spans = [span_by_prefixes(tokenizer, guarded, index, text) for index in turns]
    if len(spans) != len(turns) or any(start >= end for start, end in spans):
        raise DataError(
            Problem(
                "chat_template",
                f"its generation blocks mark {len(spans)} stretches in a chat with {len(turns)} assistant turns",
                "Put one {% generation %} block around the content and end token of each.",
            )
        )
    return RenderedSpans(Rendered(text, guard), spans)


def span_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], index: int, text: str
) -> tuple[int, int]:
    """Where in `text` the assistant's message `index` begins after its header, and where its end token ends."""
    header, _ = apply_template(tokenizer, messages[:index], add_generation_prompt=True)
    through, _ = apply_template(tokenizer, messages[: index + 1])
    if not text.startswith(header) or not text.startswith(through) or not through.startswith(header):
        raise DataError(
            Problem(
                "chat_template",
                f"renders the chat up to message {index + 1} otherwise than as the beginning of the whole chat",
                "Which tokens the assistant says cannot be known: add {% generation %} blocks to the template.",
            )
        )
    ends = [match.end() for match in special_pattern(tokenizer).finditer(through, len(header))]
    if not ends:
        raise DataError(
            Problem(
                "chat_template",
                "does not end the assistant's turns with a special token",
                "A model trained on it would never learn to stop: use another template.",
            )
        )
    return len(header), ends[-1]


def tokenize(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered chat and the characters of its text that each stands for.

    One tokenization, as every server does it. Where a message spells special tokens, the stretches between those of
    the template are encoded one by one as plain text instead, once it is seen that this gives the same ids.
    """
    ids, offsets = tokenize_whole(tokenizer, rendered.text)
    if not rendered.guard:
        return ids, offsets
    if tokenize_stretches(tokenizer, rendered.text, "")[0] != ids:
        raise DataError(
            Problem(
                "chat",
                "a message spells a special token, and this tokenizer cannot encode it as text",
                "Remove such rows in the cleaning stage.",
            )
        )
    return tokenize_stretches(tokenizer, rendered.text, rendered.guard)


def tokenize_whole(
    tokenizer: PreTrainedTokenizerBase, text: str, *, split_special_tokens: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    if split_special_tokens and (plain := marks_of(tokenizer).plain):
        said = plain.encode(text, add_special_tokens=False)
        return said.ids, said.offsets
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"], [(start, end) for start, end in encoded["offset_mapping"]]


def tokenize_stretches(
    tokenizer: PreTrainedTokenizerBase, text: str, guard: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """As `tokenize_whole`, stretch by stretch, and without the guard characters; the offsets still count them."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for match in [*special_pattern(tokenizer).finditer(text), None]:
        stretch = text[position : match.start() if match else len(text)]
        # Character of the text as it is encoded -> character of the guarded text.
        places = [position + place for place, character in enumerate(stretch) if not guard or character != guard]
        if places:
            plain = stretch.replace(guard, "") if guard else stretch
            inner, ranges = tokenize_whole(tokenizer, plain, split_special_tokens=True)
            ids += inner
            offsets += [
                (places[start], places[end - 1] + 1) if end > start else (places[start],) * 2 for start, end in ranges
            ]
        if match:
            ids += tokenizer.convert_tokens_to_ids([match[0]])
            offsets.append(match.span())
            position = match.end()
    return ids, offsets


def ends_with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return any(text.endswith(token.content) for token in special_tokens(tokenizer))


def boundary_error(tokenizer: PreTrainedTokenizerBase, messages: Messages, token: int) -> BoundaryError:
    piece = tokenizer.convert_ids_to_tokens(token)
    return BoundaryError(
        Problem(
            about(messages),
            f"the tokens around {piece!r} are other than those of a prompt and of the answer to it",
            "Use a chat template whose turns stand between special tokens, or drop the row.",
        )
    )
