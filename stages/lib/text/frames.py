"""The special tokens that an encoder's tokenizer puts around one text, and between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    types: tuple[int, int, int, int, int] | None = field(default=None, compare=False)
    """The token type ids that the tokenizer gives to what stands before, to the first text, between, to the second and after.
    None: 0 up to the second text, and 1 from there."""

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def type_ids(self, first: int, second: int = 0) -> list[int]:
        """The token type ids of `first` tokens in this frame, or of a pair with `second` more."""
        types = self.types or (0, 0, 0, int(bool(self.between)), int(bool(self.between)))
        counts = (len(self.before), first, len(self.between), second, len(self.after))
        return [each for each, count in zip(types, counts, strict=True) for _ in range(count)]

    def around(self, first: Sequence[int], second: Sequence[int] = ()) -> list[int]:
        """The ids of a text, or of a pair, with the special tokens."""
        return [*self.before, *first, *self.between, *second, *self.after]


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
    frame = frame_as_it_is(tokenizer, pair=pair)
    return frame if frame.before and (frame.between or not pair) else None


def frame_as_it_is(tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> Frame:
    """What the tokenizer puts around one text, or a pair, be it nothing."""
    texts = ("a", "a") if pair else ("a",)
    encoded = tokenizer(*texts, return_token_type_ids=True)
    ids, parts, types = encoded["input_ids"], encoded.sequence_ids(0), encoded["token_type_ids"]
    first = parts.index(0)
    last = len(parts) - 1 - parts[::-1].index(1 if pair else 0)
    between = [place for place in range(first, last) if parts[place] is None]

    def type_at(places: Sequence[int]) -> int:
        return types[places[0]] if places else 0

    second = [parts.index(1)] if pair else []
    places = (range(first), [first], between, second, range(last + 1, len(ids)))
    before, _, middle, _, after = ([ids[place] for place in each] for each in places)
    kinds = tuple(type_at(each) for each in places)
    return Frame(before, middle, after, (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]))


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


def kept_of_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay where they have room for `room` together: the longer one loses its end first.

    This is `longest_first` of the tokenizers library, which is what `truncation=True` means there: where both are longer
    than half of the room, each gets half, and the second the odd token.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
