"""An encoder as the start of a task: its tokenizer with special tokens around texts, its body under a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pipeline.artifact import Facts
from pipeline.errors import ArtifactError, DataError, Problem
from stages.lib.encoder_params import length_problems
from stages.lib.models import read_config
from stages.lib.tagging import Offset, whole_characters
from stages.lib.tokenization import facts_of_tokenizer, load_tokenizer


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


def add_head(auto_class: Any, encoder: Path, **config: Any) -> PreTrainedModel:
    """The encoder's body under the new, random head of `auto_class`, in float32; `config` goes to the model's config.

    Only the head (and a pooler, which the masked objective does not train) may be new. Raises `ArtifactError` if
    weights of the body are missing.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of the new head's weights, in the words of a warning
    try:
        model, report = auto_class.from_pretrained(
            encoder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **config,
        )
    finally:
        logging.set_verbosity(level)
    body = f"{model.base_model_prefix}."
    holes = sorted(name for name in report["missing_keys"] if name.startswith(body) and ".pooler." not in name)
    holes += sorted(str(key) for key in report.get("mismatched_keys", ()))
    if holes:
        raise ArtifactError(
            Problem(str(encoder), f"does not hold the weights {', '.join(holes[:3])}", "Name a trained encoder.")
        )
    return model


def require_length(encoder: Path, max_length_tokens: int) -> None:
    """Raises `DataError` if texts of `max_length_tokens` are longer than the encoder takes."""
    problems = length_problems(read_config(encoder), max_length_tokens)
    if problems:
        raise DataError(*problems)


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """The sequences as one tensor of B x T, filled up with `value` on the right."""
    width = max(map(len, sequences), default=0)
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences], dtype=torch.long)


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """What the model is called with, of B x T: `input_ids`, `attention_mask`, and `token_type_ids` if it knows them."""
    inputs = {
        "input_ids": pad(ids, tokenizer.pad_token_id or 0),
        "attention_mask": pad([[1] * len(each) for each in ids], 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = pad(type_ids, 0)
    return inputs


def call(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
    """The model's output for the part of the batch that `model_inputs` made."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: batch[name] for name in names if name in batch})


def facts_of(
    tokenizer: PreTrainedTokenizerBase, *, head_type: str, max_length_tokens: int, precision: str, **known: Any
) -> Facts:
    """What the consumers of an encoder task's model check."""
    of_tokenizer = facts_of_tokenizer(tokenizer)
    of_tokenizer.pop("stop_token_ids")  # where generation stops; nothing is generated here
    return Facts(**of_tokenizer, max_length_tokens=max_length_tokens, head_type=head_type, dtype=precision, **known)
