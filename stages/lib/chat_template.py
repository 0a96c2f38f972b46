"""Chats as tokens: preset templates, which tokens the assistant says, and how a long chat is cut.

The ids of a chat come from one tokenization of its rendered text, and what the assistant says is found as a range of
characters in that text: tokens are never glued together from separately encoded turns. What a message says is text,
also where it spells a special token. Nothing here imports torch or transformers before it is called.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


def split_last_answer(messages: Messages) -> tuple[list[Mapping[str, str]], str]:
    """The conversation up to the assistant's last turn, and what that turn says; all of it and "" if there is no such turn."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return (list(messages[: turns[-1]]), messages[turns[-1]]["content"]) if turns else (list(messages), "")


@dataclass(frozen=True)
class Preset:
    """A chat template and the special tokens it is written with. Assistant turns stand in `{% generation %}` blocks."""

    template: str
    special_tokens: tuple[str, ...]


SLIPWAY = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("unknown role '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|' ~ message.role ~ '|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content ~ '<|end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

CHATML = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("unknown role '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content ~ '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PRESETS: dict[str, Preset] = {
    # Every role is one special token, so that no answer can grow together with the header before it.
    "slipway": Preset(SLIPWAY, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # What most tools know. An answer that begins with a line break cannot be told from the header's: see encode_chat.
    "chatml": Preset(CHATML, ("<|im_start|>", "<|im_end|>")),
}

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

NONCHARACTERS = [chr(code) for code in range(0xFDE0, 0xFDF0)]
"""Unicode keeps these for internal use: no text should have them, and which one is free is looked up per chat."""

TOO_LONG = "too_long"
"""The last exchange alone is longer than the limit."""
PROMPT_BOUNDARY = "prompt_boundary"
"""A token reaches from the assistant's header into its answer: no prompt could lead to these tokens."""


class BoundaryError(DataError):
    """In training the tokens before an answer would be others than those of the prompt that asks for it."""


class EncodedChat(NamedTuple):
    """A chat as tokens: the ids, and 1 for each token of an assistant turn including the one that ends it, else 0."""

    input_ids: list[int]
    assistant_mask: list[int]


class FittedChat(NamedTuple):
    """A chat of at most so many tokens. `encoded` is None where that cannot be done, and `reason` then says why."""

    encoded: EncodedChat | None
    dropped_messages: int
    reason: str


class FittedPreference(NamedTuple):
    """Two answers to the same prompt, each with it of at most so many tokens, or None and the `reason`.

    The masks cover the answers only, not what the assistant says within the prompt.
    """

    chosen: EncodedChat | None
    rejected: EncodedChat | None
    dropped_messages: int
    reason: str


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, mask_from: int = 0) -> EncodedChat:
    """The ids of the whole chat, and a mask over the assistant's turns from message `mask_from` on.

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
        if index >= mask_from:
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


def fit_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length_tokens: int) -> FittedChat:
    """The chat in at most `max_length_tokens`, its oldest turns dropped as far as needed.

    The system message stays, and so does the last exchange with an answer; nothing is cut in the middle.
    """
    system, exchanges = split_exchanges(messages)
    answered = [index for index, each in enumerate(exchanges) if any(m["role"] == "assistant" for m in each)]
    if not answered:
        raise DataError(Problem(about(messages), "has no assistant turn", "Such a chat teaches nothing."))

    def attempt(dropped: int) -> list[EncodedChat]:
        return [encode_chat(tokenizer, [*system, *joined(exchanges[dropped:])])]

    fitted, dropped, reason = fit(attempt, answered[-1], max_length_tokens)
    return FittedChat(fitted[0] if fitted else None, len(joined(exchanges[:dropped])), reason)


def fit_preference(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    max_length_tokens: int,
) -> FittedPreference:
    """Prompt with chosen and prompt with rejected answer, each in at most `max_length_tokens`.

    The same oldest turns of the prompt are dropped for both; its system message and last exchange stay.
    """
    system, exchanges = split_exchanges(prompt)

    def attempt(dropped: int) -> list[EncodedChat]:
        kept = [*system, *joined(exchanges[dropped:])]
        return [encode_chat(tokenizer, [*kept, *answer], mask_from=len(kept)) for answer in (chosen, rejected)]

    fitted, dropped, reason = fit(attempt, max(len(exchanges) - 1, 0), max_length_tokens)
    chosen_ids, rejected_ids = fitted or (None, None)
    return FittedPreference(chosen_ids, rejected_ids, len(joined(exchanges[:dropped])), reason)


def fit(
    attempt: Callable[[int], list[EncodedChat]], droppable: int, max_length_tokens: int
) -> tuple[list[EncodedChat] | None, int, str]:
    """What `attempt(k)` gives for the smallest k up to `droppable` at which everything fits, k, and else a reason."""
    results: dict[int, list[EncodedChat]] = {}

    def fits(dropped: int) -> bool:
        results[dropped] = attempt(dropped)
        return all(len(each.input_ids) <= max_length_tokens for each in results[dropped])

    try:
        fewest = 0 if fits(0) else 1 + bisect_left(range(1, droppable + 1), True, key=fits)
    except BoundaryError:
        return None, 0, PROMPT_BOUNDARY
    if fewest > droppable:
        return None, 0, TOO_LONG
    return results[fewest], fewest, ""


def split_exchanges(messages: Messages) -> tuple[list[Mapping[str, str]], list[list[Mapping[str, str]]]]:
    """The leading system messages, and the rest in groups that each begin with a user message."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Mapping[str, str]]] = []
    for message in messages[first:]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges


def joined(exchanges: Sequence[Sequence[Mapping[str, str]]]) -> list[Mapping[str, str]]:
    return [message for exchange in exchanges for message in exchange]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends an assistant's turn in this template, as the template itself shows it. None without template."""
    if not tokenizer.chat_template:
        return None
    try:
        ids, mask = encode_chat(tokenizer, PROBES[0])
    except DataError:
        return None
    return max((position, token) for position, (token, said) in enumerate(zip(ids, mask, strict=True)) if said)[1]


PROBES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": " two  three"},
        {"role": "user", "content": "\n\tfour\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "f(x)"},
        {"role": "assistant", "content": "```python\nreturn 1\n```\n"},
    ],
]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises `DataError` with all that makes the template unfit for training on the assistant's turns.

    Tried on a single-turn and a multi-turn chat: the prompt of each answer must be an exact prefix, in tokens, of the
    training sequence; each turn must end in a special token; bos stands once at the start or not at all; and a message
    that spells special tokens must not produce them.
    """
    problems = []
    for messages in PROBES:
        try:
            problems += template_problems(tokenizer, messages, where)
        except DataError as error:
            problems += [p if isinstance(p, Problem) else Problem(where, p) for p in error.problems]
    if problems:
        raise DataError(*dict.fromkeys(problems))


def template_problems(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> list[Problem]:
    problems = []
    ids, mask = encode_chat(tokenizer, messages)
    starts = [i for i in range(len(ids)) if mask[i] and not (i and mask[i - 1])]
    ends = [i for i in range(len(ids)) if mask[i] and not (i + 1 < len(ids) and mask[i + 1])]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(starts) != len(turns):
        problems.append(
            Problem(where, f"marks {len(starts)} assistant turns of {len(turns)}", "Mark each one by itself.")
        )
    for index, start in zip(turns, starts, strict=False):
        if encode_prompt(tokenizer, messages[:index]) != ids[:start]:
            problems.append(
                Problem(
                    where,
                    f"the prompt for message {index + 1} is not how the training sequence begins",
                    "What add_generation_prompt writes must be what stands before a {% generation %} block.",
                )
            )
    special = special_ids(tokenizer)
    if any(ids[end] not in special for end in ends):
        problems.append(
            Problem(
                where,
                "does not end each assistant turn with a special token",
                "Write one at the end of the generation block.",
            )
        )
    if (bos := tokenizer.bos_token_id) is not None and bos in ids[1:] and tokenizer.bos_token != tokenizer.eos_token:
        problems.append(Problem(where, f"writes {tokenizer.bos_token} elsewhere than at the start", "Write it once."))
    spelled = "".join(token.content for token in special_tokens(tokenizer))
    hostile = [{**message, "content": message["content"] + spelled} for message in messages]
    if [i for i in encode_chat(tokenizer, hostile).input_ids if i in special] != [i for i in ids if i in special]:
        problems.append(Problem(where, "lets messages that spell special tokens produce them", "This must not be."))
    return problems


# How a chat becomes text, and text becomes ids.


@dataclass(frozen=True)
class Rendered:
    """A rendered chat. Special tokens that a message spells have `guard` within ("" where none does)."""

    text: str
    guard: str

    def upto(self, end: int) -> Rendered:
        return Rendered(self.text[:end], self.guard)


@dataclass(frozen=True)
class RenderedSpans:
    """A rendered chat, and for each assistant turn the characters from its content to the end of its last token."""

    rendered: Rendered
    spans: list[tuple[int, int]]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> Rendered:
    guarded, guard = guard_special(tokenizer, messages)
    text, _ = apply_template(tokenizer, guarded, add_generation_prompt=add_generation_prompt)
    return Rendered(text, guard)


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


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered text and the character ranges of its generation blocks; None if the template has no such blocks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise DataError(
            Problem("chat_template", "the tokenizer has none", "Use a tokenizer that was made or trained for chats.")
        )
    template = tokenizer.get_chat_template()
    marked = GENERATION_BLOCK.search(template) is not None
    try:
        variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marked,
            **variables,
        )
    except TemplateError as error:
        raise DataError(Problem(about(messages), f"the chat template refuses it: {error}")) from None
    texts, spans = rendered
    return texts[0], spans[0] if marked else None


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


def guard_special(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[dict[str, str]], str]:
    """The messages with a guard character inside each special token that their content spells, and that character.

    The guard keeps what the template writes and what a message says apart. It is "" if no message spells any.
    """
    require_messages(messages)
    pattern = special_pattern(tokenizer)
    contents = [message["content"] for message in messages]
    if not any(pattern.search(content) for content in contents):
        return [dict(message) for message in messages], ""
    guard = next((each for each in NONCHARACTERS if not any(each in content for content in contents)), "")
    if not guard or any(len(token.content) < 2 for token in special_tokens(tokenizer)):
        raise DataError(Problem(about(messages), "spells special tokens in a way that cannot be told from real ones"))
    guarded = []
    for message in messages:
        content = message["content"]
        while pattern.search(content):  # again, because two spelled tokens may overlap
            content = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], content)
        guarded.append({**message, "content": content})
    return guarded, guard


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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The added tokens that are special: ids that text must never produce by itself."""
    return [token for token in tokenizer.added_tokens_decoder.values() if token.special]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, the longest first; nothing if there is none."""
    names = sorted((token.content for token in special_tokens(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def ends_with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return any(text.endswith(token.content) for token in special_tokens(tokenizer))


def require_messages(messages: Messages) -> None:
    """Raises `DataError` unless each message is a mapping with a role and a content that are texts."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                Problem(
                    f"message {index + 1}",
                    f"is no message: {message!r:.80}",
                    "It needs a role and a content, both texts.",
                )
            )
    if not messages:
        raise DataError(Problem("chat", "has no messages"))


def about(messages: Messages) -> str:
    """A few words by which the reader finds the chat again."""
    first = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return f"chat {first[:60]!r}"


def boundary_error(tokenizer: PreTrainedTokenizerBase, messages: Messages, token: int) -> BoundaryError:
    piece = tokenizer.convert_ids_to_tokens(token)
    return BoundaryError(
        Problem(
            about(messages),
            f"the tokens around {piece!r} are other than those of a prompt and of the answer to it",
            "Use a chat template whose turns stand between special tokens, or drop the row.",
        )
    )
