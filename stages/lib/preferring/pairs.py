"""Preference pairs as tokens, and the micro batches made of them.

N: pairs, T: tokens of a padded sequence. A micro batch of N pairs is 2N sequences, the N chosen ones first, so that one
forward pass sees both answers of a pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Preempted, Problem
from pipeline.stage import Context
from pipeline.store.artifact import canonical_json, digest_bytes
from pipeline.store.durable import replacing_folder
from pipeline.store.numbers import json_text
from stages.lib.formulas.token_losses import Tensors
from stages.lib.processes.collectives import any_process, barrier, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import Row, is_margin, read_rows
from stages.lib.rows.ledger import Ledger, add_ledgers
from stages.lib.text.batches import Collate
from stages.lib.text.chat_fitting import fit_preference
from stages.lib.text.chats import SHORTENED, digest_of

EQUAL = "chosen_equals_rejected"
"""Both answers are the same tokens: there is nothing to prefer."""


PAIRS_PER_ROUND = 256
"""After so many pairs in each process, all of them look whether they were asked to stop."""


SIDES = ("chosen", "rejected")


MARGINS = "margins.npy"


CATEGORIES = ("source", "corruption")
"""What tells pairs apart, where a row says it: the data set it is from, and how its rejected answer was made."""


COLUMNS = ("row", *CATEGORIES, "chosen", "rejected", "end")
"""Of a pair: its row in the file, the numbers of its categories, where in the flat arrays each side begins, and the end."""


@dataclass
class Part:
    """The pairs that one process tokenizes: every so-many-th of the file."""

    with_margins: bool = False
    """Whether each row's `margin` is kept."""
    ids: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    table: list[list[int]] = field(default_factory=list)
    """`COLUMNS` of each pair."""
    margins: list[float] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    """(row of the file, reason, example)."""
    read: int = 0
    shortened: int = 0

    def add(self, index: int, row: Row, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int) -> None:
        self.read += 1
        pair = fit_preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length_tokens)
        reason = pair.reason
        if pair.chosen is not None and pair.chosen == pair.rejected:
            reason = EQUAL
        if reason:
            said = " | ".join(message["content"] for message in [*row["prompt"], *row["chosen"]])
            self.dropped.append((index, reason, said[:200]))
            return
        self.shortened += pair.dropped_messages > 0
        if self.with_margins:
            self.margins.append(row["margin"])
        places = [index, *(self.number_of(row.get(name)) for name in CATEGORIES)]
        for encoded in (pair.chosen, pair.rejected):
            assert encoded is not None, "without a reason both are there"
            places.append(len(self.ids))
            self.ids += encoded.input_ids
            self.answer += encoded.assistant_mask
        self.table.append([*places, len(self.ids)])

    def number_of(self, category: Any) -> int:
        """The place of a category in `categories`, as it is written in the name of a metric; -1 if the row has none."""
        if not category:
            return -1
        name = re.sub(r"[^0-9a-zA-Z]+", "_", str(category))
        if name not in self.categories:
            self.categories.append(name)
        return self.categories.index(name)

    def write(self, folder: Path) -> None:
        """Writes the part as a whole or not at all."""
        rest = {name: getattr(self, name) for name in ("categories", "dropped", "read", "shortened")}
        with replacing_folder(folder) as part:
            np.save(part / "ids.npy", np.asarray(self.ids, dtype=np.int32))
            np.save(part / "answer.npy", np.asarray(self.answer, dtype=np.uint8))
            np.save(part / "table.npy", np.asarray(self.table, dtype=np.int64).reshape(-1, len(COLUMNS)))
            if self.with_margins:
                np.save(part / MARGINS, np.asarray(self.margins, dtype=np.float64))
            (part / "rest.json").write_text(json_text(rest, "rest.json"), encoding="utf-8")


class Pairs(Sequence[dict[str, Any]]):
    """Tokenized pairs in the order of their file, which stay on disk until a row is asked for.

    A row has `chosen_ids`, `chosen_answer`, `rejected_ids`, `rejected_answer`, the numbers of its two `categories` (-1:
    none), `margin` where margins were kept and, once they are known, the two log-probabilities under a reference as
    `reference`. `..._answer` is 1 for each token of the answer, including the one that ends its turn, and 0 for those of
    the prompt.
    """

    def __init__(self, folders: Sequence[Path], reference_N2: NDArray[np.float64] | None = None) -> None:
        self.folders = folders
        self.reference_N2 = reference_N2
        rests = [json.loads((folder / "rest.json").read_bytes()) for folder in folders]
        self.categories: list[str] = sorted({name for rest in rests for name in rest["categories"]})
        self.ids = [np.load(folder / "ids.npy", mmap_mode="r") for folder in folders]
        self.answer = [np.load(folder / "answer.npy", mmap_mode="r") for folder in folders]
        tables = []
        for number, (folder, rest) in enumerate(zip(folders, rests, strict=True)):
            table = np.load(folder / "table.npy")
            # The last one stays -1, and -1 finds it: the number of no category.
            renumbered = np.asarray([*(self.categories.index(name) for name in rest["categories"]), -1])
            table[:, 1:3] = renumbered[table[:, 1:3]]
            tables.append(np.insert(table, 0, number, axis=1))
        together = np.concatenate(tables)
        order = np.argsort(together[:, 1])
        # Part, and `COLUMNS` without the row, in the order of the rows.
        self.table: NDArray[np.int64] = np.delete(together[order], 1, axis=1)
        self.category_N2: NDArray[np.int64] = self.table[:, 1:3]
        """The numbers of each pair's `CATEGORIES` in `categories`, -1 where it has none."""
        margins = [np.load(folder / MARGINS) for folder in folders if (folder / MARGINS).exists()]
        self.margin_N: NDArray[np.float64] | None = np.concatenate(margins)[order] if margins else None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        part, _, _, *places = (int(value) for value in self.table[index])
        row: dict[str, Any] = {"categories": self.category_N2[index]}
        for side, begin, end in zip(SIDES, places, places[1:], strict=False):
            row[f"{side}_ids"] = self.ids[part][begin:end]
            row[f"{side}_answer"] = self.answer[part][begin:end]
        if self.margin_N is not None:
            row["margin"] = self.margin_N[index]
        if self.reference_N2 is not None:
            row["reference"] = self.reference_N2[index]
        return row

    def with_reference(self, logprobs_N2: NDArray[np.float64]) -> Pairs:
        """The same pairs, each with its two log-probabilities under a reference."""
        assert logprobs_N2.shape == (len(self), 2), "one row a pair"
        return Pairs(self.folders, logprobs_N2)

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """N x 2: tokens of each sequence, prompt and answer."""
        return np.diff(self.table[:, 3:], axis=1)

    def answer_lengths(self) -> NDArray[np.int64]:
        """N x 2: tokens of each answer. Reads everything."""
        counts = [[int(row[f"{side}_answer"].sum()) for side in SIDES] for row in self]
        return np.asarray(counts, dtype=np.int64)

    def last_ids(self) -> set[int]:
        """The ids that sequences end with. Reads the last token of each."""
        ends = self.table[:, [4, 5]] - 1
        return {int(self.ids[part][end]) for part, pair in zip(self.table[:, 0], ends, strict=True) for end in pair}


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
    (train, dropped), (heldout, heldout_dropped) = (
        tokenize_pairs(ctx, ctx.inputs["preferences"] / f"{split}.jsonl", tokenizer, max_length_tokens, with_margins)
        for split in ("train", "heldout")
    )
    ledger = add_ledgers(dropped, heldout_dropped)
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items())) or "none"
    ctx.journal.note(f"{len(train):,} training and {len(heldout):,} held-out pairs; dropped of {ledger.read:,}: {said}")
    if 1 - ledger.kept / ledger.read > max_dropped_fraction:
        raise DataError(
            Problem(
                "inputs.preferences",
                f"{1 - ledger.kept / ledger.read:.0%} of the pairs cannot be used: {dict(ledger.dropped)}",
                "Raise max_length_tokens, clean the pairs, or allow it with max_dropped_fraction.",
            )
        )
    if ctx.world.is_main:
        ledger.write(ctx.out)
    return train, heldout, ledger


def tokenize_pairs(
    ctx: Context, path: Path, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, with_margins: bool
) -> tuple[Pairs, Ledger]:
    """The pairs of `path` that can be learned from, and what was dropped; the same in every process.

    A pair whose prompt is too long for either answer loses the prompt's oldest turns, the same for both. Each process
    tokenizes its share into the step's work folder; what is there from before a restart is used again. Raises
    `Preempted` if asked to stop, and `DataError` if no pair is left or one has no margin where they are asked for.
    """
    join_processes(ctx)
    world = ctx.world
    kept = (*COLUMNS, "margin") if with_margins else COLUMNS
    key = from_main(lambda: digest_bytes(canonical_json([digest_of(path, tokenizer, max_length_tokens), kept]))[:12])
    folders = [ctx.work / "pairs" / f"{path.stem}-{key}-{rank}-of-{world.size}" for rank in range(world.size)]
    if not from_main(lambda: all(folder.exists() for folder in folders)):
        rows = list(read_rows(path))
        if with_margins:
            require_margins(rows, path)
        part = Part(with_margins)
        step = PAIRS_PER_ROUND * world.size
        for start in range(0, len(rows), step):
            if any_process(ctx.stop_requested()):
                raise Preempted
            for index in range(start + world.rank, min(start + step, len(rows)), world.size):
                part.add(index, rows[index], tokenizer, max_length_tokens)
            done = min(start + step, len(rows))
            ctx.journal.write("progress", what=f"{path.stem} pairs tokenized", done=done, total=len(rows))
        part.write(folders[world.rank])
        barrier()
    pairs, ledger = Pairs(folders), read_ledger(folders)
    ledger.kept = len(pairs)
    if not len(pairs):
        raise DataError(
            Problem(
                str(path),
                f"none of the {ledger.read:,} pairs can be used: {dict(ledger.dropped)}",
                "Look at the rows, or raise max_length_tokens.",
            )
        )
    return pairs, ledger


def require_margins(rows: Sequence[Row], path: Path) -> None:
    """Raises `DataError` unless every row has a margin: to drop those without one could drop a whole source."""
    without = [index for index, row in enumerate(rows) if not is_margin(row.get("margin"))]
    if without:
        sources = ", ".join(sorted({str(rows[index].get("source", "unknown")) for index in without}))
        raise DataError(
            Problem(
                str(path),
                f"{len(without):,} of {len(rows):,} pairs have no margin, which must be a number of at least 0: the first"
                f" in line {without[0] + 1}; sources: {sources}",
                "Name the column of each source (`columns: {margin: ...}`), or take margin_from: constant.",
            )
        )


def read_ledger(folders: Sequence[Path]) -> Ledger:
    """What all parts together read and dropped, in the order of the file."""
    rests = [json.loads((folder / "rest.json").read_bytes()) for folder in folders]
    ledger = Ledger(read=sum(rest["read"] for rest in rests))
    for _, reason, example in sorted(tuple(drop) for rest in rests for drop in rest["dropped"]):
        ledger.drop(reason, example)
    if shortened := sum(rest["shortened"] for rest in rests):
        ledger.repaired[SHORTENED] = shortened
    return ledger


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with where masks tell what is padding: any would do."""
    return tokenizer.pad_token_id or 0


def collate_pairs(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and `answer_mask` of 2N x T, `category_N2`, and `margin_N` and `reference_N2`
    where the rows have them.

    Sequences are padded on the right. What is padding is told by position, in the masks: an id never decides it.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        ids = [row[f"{side}_ids"] for side in SIDES for row in rows]
        answers = [row[f"{side}_answer"] for side in SIDES for row in rows]
        batch = {
            "input_ids": padded(ids, padding_id),
            "attention_mask": padded([np.ones_like(each) for each in ids], 0),
            "answer_mask": padded(answers, 0),
            "category_N2": torch.from_numpy(np.stack([row["categories"] for row in rows])),
        }
        if "margin" in rows[0]:
            batch["margin_N"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        if "reference" in rows[0]:
            batch["reference_N2"] = torch.from_numpy(np.stack([row["reference"] for row in rows]))
        return batch

    return collate


def padded(sequences: Sequence[NDArray[Any]], value: int) -> torch.Tensor:
    tensors = [torch.from_numpy(np.array(each, dtype=np.int64)) for each in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def num_pairs(batch: Tensors) -> torch.Tensor:
    return torch.tensor(len(batch["input_ids"]) // 2)
