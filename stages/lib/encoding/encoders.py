"""How an encoder is called in all of its tasks: the batch that it reads, and the part of a batch that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from stages.lib.text.batches import attention_mask, padded, padding_of
from stages.lib.text.opening import GENERIC_CLASSES

TYPE_IDS = "token_type_ids"


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """What the model is called with, of B x T: `input_ids`, `attention_mask`, and `token_type_ids` if it knows them."""
    inputs = {
        "input_ids": padded(ids, padding_of(tokenizer)),
        "attention_mask": attention_mask(ids),
    }
    if TYPE_IDS in tokenizer.model_input_names:
        inputs[TYPE_IDS] = padded(type_ids)
    return inputs


def call(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
    """The model's output for the part of the batch that `model_inputs` made."""
    names = ("input_ids", "attention_mask", TYPE_IDS)
    return model(**{name: batch[name] for name in names if name in batch})


def match_type_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Lets the tokenizer give `token_type_ids` where the model in `folder` tells the texts of a pair apart by them.

    A tokenizer of no particular family does not know what its model has, and one of another family may give ids that the
    model has no embedding for. What is set here is saved with the tokenizer, so that others call the model alike.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    num_types = getattr(config, "type_vocab_size", None)
    if num_types is None:
        return
    names = [name for name in tokenizer.model_input_names if name != TYPE_IDS]
    given = TYPE_IDS in tokenizer.model_input_names
    if num_types > 1 and not given and type(tokenizer).__name__ in GENERIC_CLASSES:
        names.insert(1, TYPE_IDS)
    elif num_types != 1 or not given:
        return
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names
