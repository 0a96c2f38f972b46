"""Preference pairs as tokens, and the micro batches made of them.

N: pairs, T: tokens of a padded sequence. A micro batch of N pairs is 2N sequences, the N chosen ones first, so that one
forward pass sees both answers of a pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.answers import AnsweredSequence, batch_of_answers
from stages.lib.processes.collectives import from_main
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import Row, is_margin, read_rows
from stages.lib.rows.ledger import Ledger
from stages.lib.text.batches import Collate
from stages.lib.text.chat_fitting import fit_preference, with_why
from stages.lib.text.tokenized_parts import SHORTENED, TokenizedRow, TokenizedRows, Tokenizing, tokenize_input

EQUAL = "chosen_equals_rejected"
"""Both answers are the same tokens: there is nothing to prefer."""


SIDES = ("chosen", "rejected")


CATEGORIES = ("source", "corruption")
"""What tells pairs apart, where a row says it: the data set it is from, and how its rejected answer was made."""


class Pairs(Sequence[dict[str, Any]]):
    """Tokenized pairs in the order of their file, which stay on disk until a row is asked for.

    A row has `chosen_ids`, `chosen_answer`, `rejected_ids`, `rejected_answer`, the numbers of its two `categories` (-1:
    none), `margin` where margins were kept and, once they are known, the two log-probabilities under a reference as
    `reference`. `..._answer` is 1 for each token of the answer, including the one that ends its turn, and 0 for those of
    the prompt.
    """

    def __init__(self, tokenized: TokenizedRows, reference_N2: NDArray[np.float64] | None = None) -> None:
        self.tokenized = tokenized
        self.reference_N2 = reference_N2
        names_N2 = np.stack([tokenized.columns[name] for name in CATEGORIES], axis=1)
        self.categories: list[str] = sorted({str(name) for name in names_N2.flat} - {""})
        numbers = {name: number for number, name in enumerate(self.categories)} | {"": -1}
        self.category_N2 = np.asarray([[numbers[str(name)] for name in row] for row in names_N2], dtype=np.int64)
        """The numbers of each pair's `CATEGORIES` in `categories`, -1 where it has none."""
        self.margin_N: NDArray[np.float64] | None = tokenized.columns.get("margin")

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"categories": self.category_N2[index]}
        for side, (ids, answer) in zip(SIDES, self.sequences(index), strict=True):
            row[f"{side}_ids"] = ids
            row[f"{side}_answer"] = answer
        if self.margin_N is not None:
            row["margin"] = self.margin_N[index]
        if self.reference_N2 is not None:
            row["reference"] = self.reference_N2[index]
        return row

    def sequences(self, index: int) -> list[AnsweredSequence]:
        """The ids and the answer mask of both sequences of a pair."""
        return self.tokenized.sequences(index)

    def with_reference(self, logprobs_N2: NDArray[np.float64]) -> Pairs:
        """The same pairs, each with its two log-probabilities under a reference."""
        assert logprobs_N2.shape == (len(self), 2), "one row a pair"
        return Pairs(self.tokenized, logprobs_N2)

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """N x 2: tokens of each sequence, prompt and answer."""
        return self.tokenized.lengths

    def answer_lengths(self) -> NDArray[np.int64]:
        """N x 2: tokens of each answer. Reads everything."""
        counts = [[int(row[f"{side}_answer"].sum()) for side in SIDES] for row in self]
        return np.asarray(counts, dtype=np.int64)

    def last_ids(self) -> set[int]:
        """The ids that sequences end with. Reads the last token of each."""
        return {int(ids[-1]) for index in range(len(self)) for ids, _ in self.tokenized.sequences(index)}


def open_pairs(
    ctx: Context,
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    max_dropped_fraction: float,
    *,
    with_margins: bool = False,
) -> tuple[Pairs, Pairs, Ledger]:
    """The input `preferences`, tokenized: training and held-out pairs, and the ledger of both, written to the artifact.

    Raises `DataError` if a larger share than `max_dropped_fraction` cannot be used, or a pair lacks the margin that is
    asked for.
    """
    if with_margins:
        join_processes(ctx)
        for split in ("train", "heldout"):
            path = ctx.inputs["preferences"] / f"{split}.jsonl"
            from_main(partial(require_margins, path))
    how = tokenizing_pairs(tokenizer, max_length_tokens, with_margins=with_margins)
    train, heldout, ledger = tokenize_input(ctx, "preferences", how, max_dropped_fraction)
    return Pairs(train), Pairs(heldout), ledger


def tokenizing_pairs(
    tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, *, with_margins: bool = False
) -> Tokenizing:
    """Pairs of which each answer with its prompt has at most `max_length_tokens`.

    A pair whose prompt is too long for either answer loses the prompt's oldest turns, the same for both.
    """

    def make(row: Row) -> TokenizedRow:
        pair = fit_preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length_tokens)
        if pair.chosen is None or pair.rejected is None or pair.chosen == pair.rejected:
            example = " | ".join(message["content"] for message in [*row["prompt"], *row["chosen"]])
            return TokenizedRow(reason=pair.reason or EQUAL, example=with_why(pair.why, example))
        columns: dict[str, str | float] = {name: category_name(row.get(name)) for name in CATEGORIES}
        if with_margins:
            columns["margin"] = float(row["margin"])
        repaired = {SHORTENED: 1} if pair.dropped_messages else {}
        return TokenizedRow([pair.chosen, pair.rejected], columns, repaired=repaired)

    return Tokenizing("pairs", tokenizer, make, "max_length_tokens", [max_length_tokens, with_margins])


def category_name(category: Any) -> str:
    """A category as it is written in the name of a metric; empty if the row has none."""
    return re.sub(r"[^0-9a-zA-Z]+", "_", str(category)) if category else ""


def require_margins(path: Path) -> None:
    """Raises `DataError` unless every row of the file has a margin: to drop those without one could drop a whole source."""
    count, without, sources = 0, [], set()
    for count, row in enumerate(read_rows(path), start=1):
        if not is_margin(row.get("margin")):
            without.append(count)
            sources.add(str(row.get("source", "unknown")))
    if without:
        raise DataError(
            Problem(
                str(path),
                f"{len(without):,} of {count:,} pairs have no margin, which must be a number of at least 0: the first"
                f" in line {without[0]}; sources: {', '.join(sorted(sources))}",
                "Name the column of each source (`columns: {margin: ...}`), or take margin_from: constant.",
            )
        )


def collate_pairs(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and `answer_mask` of 2N x T, `category_N2`, and `margin_N` and `reference_N2`
    where the rows have them.

    Sequences are padded on the right.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        batch = batch_of_answers(
            [(row[f"{side}_ids"], row[f"{side}_answer"]) for side in SIDES for row in rows], padding_id
        )
        batch["category_N2"] = torch.from_numpy(np.stack([row["categories"] for row in rows]))
        if "margin" in rows[0]:
            batch["margin_N"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        if "reference" in rows[0]:
            batch["reference_N2"] = torch.from_numpy(np.stack([row["reference"] for row in rows]))
        return batch

    return collate


def num_pairs(batch: Tensors) -> torch.Tensor:
    return torch.tensor(len(batch["input_ids"]) // 2)
