"""Tokens that a vocabulary gains, so that a base model can be taught a chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import DataError, Problem
from stages.lib.text.chat_presets import PRESETS, TemplateOfTokenizer, TokenToAdd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVE_ONE = (
    "Write `chat_template: chatml` and `add_tokens: true`: vocabulary and embeddings then gain what it is written with."
)
"""To a recipe whose model knows no chats."""

GROW = "Write `add_tokens: true`: the embeddings then grow with the vocabulary."

MARK = re.compile(r"<\|[\w ./-]+\|>|</?[a-z]\w*>|\[/?[A-Z][A-Z_]*\]")
"""What marks of turns look like in most templates. It is only ever proposed, never added unasked."""


def needed_tokens(wanted: str | TemplateOfTokenizer | None, written: str = "") -> list[TokenToAdd]:
    """The tokens that the template `wanted` is known to be written with: a preset's, or those of another tokenizer that
    stand in its template or in what it has `written`.
    """
    if isinstance(wanted, TemplateOfTokenizer):
        return [token for token in wanted.tokens if token.content in wanted.template or token.content in written]
    if wanted in PRESETS:
        return [TokenToAdd(content=text) for text in PRESETS[wanted].special_tokens]
    return []


def lacking(tokenizer: PreTrainedTokenizerBase, needed: Sequence[TokenToAdd]) -> list[TokenToAdd]:
    """Those of the tokens that the tokenizer does not have, or has as text where they are to be none."""
    from stages.lib.text.chat_rendering import special_tokens

    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = {token.content for token in special_tokens(tokenizer)}
    return [token for token in needed if token.content not in (special if token.special else added)]


def chosen_tokens(
    wanted: str | TemplateOfTokenizer | None,
    missing: Sequence[TokenToAdd],
    asked: bool | Sequence[str],
    known: Collection[str],
) -> list[TokenToAdd]:
    """The tokens to add, of what the template is `missing` and the param add_tokens has `asked`; `known` are there.

    Raises `DataError` if some stay missing, or cannot be known.
    """
    if asked is False:
        if missing:
            raise DataError(missing_problem(wanted, [token.content for token in missing]))
        return []
    if asked is True:
        unknown = [] if missing or not isinstance(wanted, str) or wanted in PRESETS else proposals(wanted, known)
        if unknown:
            what = "is true, and a template's text does not say for certain which tokens it is written with"
            listed = ", ".join(f'"{text}"' for text in unknown)
            raise DataError(Problem("params.add_tokens", what, f"List them: `add_tokens: [{listed}]`, as it seems."))
        return list(missing)
    if left := [token.content for token in missing if token.content not in asked]:
        raise DataError(missing_problem(wanted, left))
    described = {token.content: token for token in missing}
    # One that is there already stays as it is, unless the template needs it to be special.
    new = [text for text in asked if text in described or text not in known]
    return [described.get(text, TokenToAdd(content=text)) for text in new]


def missing_problem(wanted: str | TemplateOfTokenizer | None, texts: Sequence[str]) -> Problem:
    """That the vocabulary lacks what the template is written with."""
    name = f"'{wanted}'" if isinstance(wanted, str) else "the other tokenizer's template"
    shown = ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
    hint = "Write `add_tokens: true`: the vocabulary then gains them, and the model embeddings for them."
    return Problem("params.chat_template", f"{name} is written with {shown}, which the model's vocabulary lacks", hint)


def proposals(template: str, known: Collection[str]) -> list[str]:
    """What looks like a mark of turns in the template's text, and is no token yet."""
    return [text for text in dict.fromkeys(MARK.findall(template)) if text not in known]


def add_to_vocabulary(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[TokenToAdd]) -> list[str]:
    """Adds the tokens; returns the texts of those that are new in the vocabulary, in the order of their ids."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        described = token.model_dump(mode="json")
        tokenizer.add_tokens([AddedToken(described.pop("content"), **described)], special_tokens=token.special)
    return [token.content for token in tokens if token.content not in known]
