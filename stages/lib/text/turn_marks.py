"""The tokens that only a chat template may write: what is special, and what it marks turns with, whatever flag that carries.

Several makers, DeepSeek for one, give their role tokens the flag `special: false`: the tokenizers library then finds them in
any text, and a user who spells one begins a turn of somebody else.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from stages.lib.text.chat_dialect import ASKED, CALLED, dialect_of, written_as

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SAID = frozenset(f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response", "tools") for slash in ("", "/"))
"""What messages say by right, also where it is one token: our own text form of reasoning and tools is written in these."""

BREAK = "\ufdef"
"""A noncharacter, and none of `NONCHARACTERS`: what is encoded after it stands in the middle of a text, and begins none."""

CHATS = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    [ASKED, {"role": "assistant", "content": "b"}, ASKED],
    CALLED,
    CALLED[:3],
)


class Marks(NamedTuple):
    """What was found out of a tokenizer, and of what state of it."""

    state: tuple[str, int]
    tokens: list[Any]
    """Added tokens without the flag `special` that the template writes around what is said."""
    pattern: re.Pattern[str]
    """Matches these and all special ones."""
    at_end: re.Pattern[str]
    """The same, at the end of a text."""
    names: tuple[str, ...]
    """The texts of these and of all special ones."""
    swallowing: dict[str, Any]
    """Text -> token, of those that take white space beside them along."""


KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, Marks] = WeakKeyDictionary()

PLAIN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, int], Tokenizer]] = WeakKeyDictionary()


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks of turns; found once per tokenizer and template."""
    state = state_of(tokenizer)
    known = KNOWN.get(tokenizer)
    if known is None or known.state != state:
        tokens = found_marks(tokenizer)
        flagged = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = tuple(sorted((token.content for token in (*flagged, *tokens)), key=len, reverse=True))
        any_of = "|".join(map(re.escape, names)) or "(?!)"
        swallowing = {token.content: token for token in (*flagged, *tokens) if token.lstrip or token.rstrip}
        patterns = re.compile(any_of), re.compile(rf"(?:{any_of})\Z")
        known = KNOWN[tokenizer] = Marks(state, tokens, *patterns, names, swallowing)
    return known


def state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    return str(tokenizer.chat_template), len(tokenizer)


def found_marks(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    candidates = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        # A mark is no word and no space: those are said.
        if not token.special and token.content not in SAID and not (token.content.strip() or "a")[0].isalnum()
    ]
    if not candidates or not tokenizer.chat_template:
        return []
    written = what_is_written(tokenizer)
    return [token for token in candidates if token.content in written]


def what_is_written(tokenizer: PreTrainedTokenizerBase) -> str:
    """Chats as the tokenizer's template renders them, one after the other; those that it refuses are left out."""
    dialect = dialect_of(tokenizer)
    return "".join(
        written_as(tokenizer, chat, dialect, add_generation_prompt=prompt) for chat in CHATS for prompt in (False, True)
    )


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer for what is said: it takes no mark and nothing special for more than its characters, and `BREAK` for a
    token. Made once per tokenizer and template."""
    from tokenizers import AddedToken, Tokenizer

    state = state_of(tokenizer)
    known = PLAIN.get(tokenizer)
    if known is None or known[0] != state:
        written = json.loads(tokenizer.backend_tokenizer.to_str())
        contents = {token.content for token in marks_of(tokenizer).tokens}
        for token in written["added_tokens"]:
            token["special"] = token["special"] or token["content"] in contents
        plain = Tokenizer.from_str(json.dumps(written, allow_nan=False))
        plain.encode_special_tokens = True
        plain.no_truncation()
        plain.no_padding()
        plain.add_tokens([AddedToken(BREAK, special=False, normalized=False)])
        known = PLAIN[tokenizer] = (state, plain)
    return known[1]
