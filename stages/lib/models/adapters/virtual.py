"""How texts are read under virtual tokens, in a batch whose rows are padded before their text.

peft puts embeddings before the padding, where they would stand the further off the longer another row of the batch is, and
leaves places to the model. Here each row reads as it would alone: virtual tokens, then its text, at the places 0, 1, 2, ...

B: rows, T: tokens of a row with its padding, P: virtual tokens, D: hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EMBEDDINGS_BEFORE_A_TEXT = ("PROMPT_TUNING", "P_TUNING")
"""The methods of adapters, as peft calls them, whose virtual tokens are read like those of a text."""


def virtual_tokens_of(model: Any) -> int:
    """How many tokens stand before each text that the model reads: those of the adapter that is on it."""
    return int(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0)


def embeds_virtual_tokens(model: Any) -> bool:
    """Whether the virtual tokens that the model has are embeddings before the text, and no keys and values."""
    return getattr(getattr(model, "active_peft_config", None), "peft_type", None) in EMBEDDINGS_BEFORE_A_TEXT


def behind_virtual_tokens(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The model to call in place of `model`, and what it is given of the texts: ids or embeddings, mask, and keys and values.

    What it says of the last tokens of the rows it says in the last places, whatever was put before them.
    """
    if not virtual_tokens_of(model):
        return model, {"input_ids": ids_BT, "attention_mask": mask_BT}
    base = model.get_base_model()
    if embeds_virtual_tokens(model):
        embeddings, mask = with_virtual_embeddings(model, ids_BT, mask_BT)
        return base, {"inputs_embeds": embeddings, "attention_mask": mask}
    cache = model.get_prompt(batch_size=len(ids_BT))
    before = mask_BT.new_ones(len(mask_BT), virtual_tokens_of(model))
    mask = torch.cat([before, mask_BT], dim=1)
    return base, {"input_ids": ids_BT, "attention_mask": mask, "past_key_values": cache}


def with_virtual_embeddings(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings, B x (P + T) x D, with the virtual ones between the padding before each text and the text; and their mask."""
    virtual_BPD = model.get_prompt(batch_size=len(ids_BT))
    text_BTD = model.get_base_model().get_input_embeddings()(ids_BT)
    seen_P = mask_BT.new_ones(virtual_BPD.shape[1])
    padding_B = (mask_BT.cumsum(1) == 0).sum(1).tolist()
    rows = list(zip(text_BTD, virtual_BPD.to(text_BTD.dtype), mask_BT, padding_B, strict=True))
    embeddings = torch.stack([torch.cat([text[:pad], virtual, text[pad:]]) for text, virtual, _, pad in rows])
    mask = torch.stack([torch.cat([seen[:pad], seen_P, seen[pad:]]) for _, _, seen, pad in rows])
    return embeddings, mask
