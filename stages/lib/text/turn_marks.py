"""The tokens that only a chat template may write: what is special, and what it marks turns with, whatever flag that carries.

Several makers, DeepSeek for one, give their role tokens the flag `special: false`: the tokenizers library then finds them in
any text, and a user who spells one begins a turn of somebody else.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from pipeline.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SAID = frozenset(f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response", "tools") for slash in ("", "/"))
"""What messages say by right, also where it is one token: our own text form of reasoning and tools is written in these."""

CHATS = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
)


class Marks(NamedTuple):
    """What was found out of a tokenizer, and of what state of it."""

    state: tuple[str, int]
    tokens: list[Any]
    plain: Tokenizer | None


KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, Marks] = WeakKeyDictionary()


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The added tokens without the flag `special` that the template writes around what is said; found once per tokenizer."""
    state = (str(tokenizer.chat_template), len(tokenizer.added_tokens_decoder))
    known = KNOWN.get(tokenizer)
    if known is None or known.state != state:
        tokens = found_marks(tokenizer)
        known = KNOWN[tokenizer] = Marks(state, tokens, plain_tokenizer(tokenizer, tokens) if tokens else None)
    return known


def found_marks(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    from stages.lib.text.chat_rendering import apply_template

    candidates = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        # A mark is no word and no space: those are said.
        if not token.special and token.content not in SAID and not (token.content.strip() or "a")[0].isalnum()
    ]
    if not candidates or not tokenizer.chat_template:
        return []
    written = ""
    for chat in CHATS:
        for prompt in (False, True):
            try:
                written += apply_template(tokenizer, list(chat), add_generation_prompt=prompt)[0]
            except DataError:  # a template may know no system messages; what is wrong with it is told elsewhere
                continue
    return [token for token in candidates if token.content in written]


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase, marks: list[Any]) -> Tokenizer:
    """The tokenizer for what is said: it takes no mark and nothing special for more than its characters."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    contents = {token.content for token in marks}
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in contents
    plain = Tokenizer.from_str(json.dumps(state, allow_nan=False))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain
