"""The special tokens that an encoder's tokenizer puts around one text, and between two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Problem
from stages.lib.text.offsets import Offset, whole_characters
from stages.lib.text.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Frame:
    """The ids of the special tokens around one text (`before`, `after`), and between two."""

    before: list[int]
    between: list[int]
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def open_tokenizer(folder: Path, max_length_tokens: int) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer, which puts a start and an end token around texts and parts pairs.

    A tokenizer made for language models adds nothing, and an encoder's tasks need a first token that stands for the
    whole, and a border between question and context. It is given them here and keeps them when it is saved with the
    model, so that whoever uses both sees what training saw. Raises `ArtifactError` if it has no such tokens.
    """
    tokenizer = load_tokenizer(folder)
    if frame_of(tokenizer, pair=True) is None or frame_of(tokenizer, pair=False) is None:
        add_frame(tokenizer, folder)
    # Positions count from the left: a text must not begin at another one because a neighbour is longer.
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_length_tokens
    return tokenizer


def frame_of(tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> Frame | None:
    """What the tokenizer puts around one text, or a pair. None unless it puts something first, and between."""
    encoded = tokenizer("a", "a") if pair else tokenizer("a")
    ids, parts = encoded["input_ids"], encoded.sequence_ids(0)
    first = parts.index(0)
    last = len(parts) - 1 - parts[::-1].index(1 if pair else 0)
    between = [token for token, part in zip(ids[first:last], parts[first:last], strict=True) if part is None]
    if first == 0 or (pair and not between):
        return None
    return Frame(ids[:first], between, ids[last + 1 :])


def require_frame(tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> Frame:
    """The frame of a tokenizer from `open_tokenizer`."""
    frame = frame_of(tokenizer, pair=pair)
    assert frame is not None, "open_tokenizer gives every tokenizer its frame"
    return frame


def add_frame(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    start = tokenizer.cls_token or tokenizer.bos_token
    end = tokenizer.sep_token or tokenizer.eos_token
    if start is None or end is None:
        raise ArtifactError(
            Problem(
                str(folder),
                "has a tokenizer without a token to begin a text with, or without one to end it with",
                "It needs cls_token and sep_token, or bos_token and eos_token.",
            )
        )
    start_id, end_id = tokenizer.convert_tokens_to_ids([start, end])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0",
        pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(start, start_id), (end, end_id)],
    )
    # Where these are in its saved config, loading replaces the template by one without a border between pairs.
    for name in ("add_bos_token", "add_eos_token"):
        tokenizer.init_kwargs.pop(name, None)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Offset]]:
    """The ids of the text's tokens, and the characters that each stands for. Nothing is added, and nothing in the text is
    a special token: a text that spells `</s>` does not end there."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return encoded["input_ids"], whole_characters([(start, end) for start, end in encoded["offset_mapping"]])
