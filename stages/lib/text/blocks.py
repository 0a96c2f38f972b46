"""Blocks of packed tokens as rows for training: what the model sees of them, and what it is asked.

B: blocks of a batch, T: their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.formulas.masking import Masking
from stages.lib.formulas.token_losses import TARGETS, Tensors, next_tokens
from stages.lib.text.batches import Collate
from stages.lib.text.packed import PackedTokens


class Blocks(Sequence[dict[str, Any]]):
    """The blocks of a split, read from disk when asked for."""

    def __init__(self, packed: PackedTokens) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        block = self.packed.block(index)
        return {"input_ids": block.input_ids, "position_ids": block.position_ids}


def stacked(rows: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(row[name], dtype=np.int64) for row in rows]))


def collate_causal(*, isolate: bool) -> Collate:
    """Rows -> `input_ids` and the next tokens as targets.

    Isolated, the positions begin anew with each document. From that transformers makes attention that ends at the
    border, whatever its implementation; and the first token of a document is asked of nobody.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        ids_BT = stacked(rows, "input_ids")
        if not isolate:
            return {"input_ids": ids_BT, TARGETS: next_tokens(ids_BT)}
        positions_BT = stacked(rows, "position_ids")
        return {"input_ids": ids_BT, "position_ids": positions_BT, TARGETS: next_tokens(ids_BT, positions_BT != 0)}

    return collate


def collate_masked(masking: Masking, seed: int, *, first_position: int | None) -> Collate:
    """Rows -> `input_ids` with hidden tokens, and those as targets.

    `first_position` is the model's id of a document's first position, if documents are isolated: then a mask B x 1 x T x T
    says which pairs of tokens see each other. None: whole blocks are read.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        hidden = [masking(np.asarray(row["input_ids"], dtype=np.int64), seed, row["position"]) for row in rows]
        batch = {
            "input_ids": torch.from_numpy(np.stack([seen for seen, _ in hidden])),
            TARGETS: torch.from_numpy(np.stack([targets for _, targets in hidden])),
        }
        if first_position is None:
            return batch
        positions_BT = stacked(rows, "position_ids")
        return {
            **batch,
            "position_ids": positions_BT + first_position,
            "attention_mask": same_document(positions_BT)[:, None],
        }

    return collate


def same_document(positions_BT: torch.Tensor) -> torch.Tensor:
    """B x T x T: whether two tokens are of the same document. A document begins where the position is 0."""
    document_BT = (positions_BT == 0).cumsum(-1)
    return document_BT[:, :, None] == document_BT[:, None, :]
