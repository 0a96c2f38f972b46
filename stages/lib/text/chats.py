"""Chats as tokens on disk: tokenized once, by all processes together, and read back by each from memory maps.

B: chats of a batch, T: tokens of the longest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Preempted, Problem
from pipeline.stage import Context
from pipeline.store.artifact import canonical_json, digest_bytes, digest_file
from pipeline.store.durable import replacing_folder
from pipeline.store.numbers import json_text
from stages.lib.formulas.token_losses import TARGETS, Tensors, next_tokens
from stages.lib.processes.collectives import any_process, barrier, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import read_rows
from stages.lib.rows.ledger import Ledger
from stages.lib.text.batches import Collate
from stages.lib.text.chat_fitting import fit_chat
from stages.lib.text.tokenizers import chat_template_digest, tokenizer_digest

CHATS_PER_ROUND = 256
"""After so many chats in each process, all of them look whether they were asked to stop."""


SHORTENED = "oldest_turns_dropped"


@dataclass
class Part:
    """The chats that one process tokenizes: every so-many-th of the file."""

    ids: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(row of the file, where its tokens begin in `ids`)."""
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    """(row of the file, reason, example)."""
    read: int = 0
    shortened: int = 0

    def add(
        self, index: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length_tokens: int
    ) -> None:
        self.read += 1
        fitted = fit_chat(tokenizer, row["messages"], max_length_tokens)
        if fitted.encoded is None:
            self.dropped.append((index, fitted.reason, " | ".join(m["content"] for m in row["messages"])[:200]))
            return
        self.shortened += fitted.dropped_messages > 0
        self.places.append((index, len(self.ids)))
        self.ids += fitted.encoded.input_ids
        self.said += fitted.encoded.assistant_mask

    def write(self, folder: Path) -> None:
        """Writes the part as a whole or not at all."""
        counts = {"dropped": self.dropped, "read": self.read, "shortened": self.shortened}
        with replacing_folder(folder) as part:
            np.save(part / "ids.npy", np.asarray(self.ids, dtype=np.int32))
            np.save(part / "said.npy", np.asarray(self.said, dtype=np.uint8))
            np.save(part / "places.npy", np.asarray([*self.places, (-1, len(self.ids))], dtype=np.int64))
            (part / "counts.json").write_text(json_text(counts, "counts.json"), encoding="utf-8")


class Chats(Sequence[dict[str, Any]]):
    """Tokenized chats in the order of their file: `input_ids`, and `said`, 1 for each token that the assistant says.

    Both stay on disk until a row is asked for.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.ids = [np.load(folder / "ids.npy", mmap_mode="r") for folder in folders]
        self.said = [np.load(folder / "said.npy", mmap_mode="r") for folder in folders]
        places = [np.load(folder / "places.npy") for folder in folders]
        # (row of the file, part, begin, end), sorted by the first.
        found = [
            (int(row), part, int(begin), int(end))
            for part, table in enumerate(places)
            for (row, begin), (_, end) in pairwise(table)
        ]
        self.rows = np.asarray(sorted(found), dtype=np.int64).reshape(-1, 4)[:, 1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        part, begin, end = self.rows[index]
        return {"input_ids": self.ids[part][begin:end], "said": self.said[part][begin:end]}

    @property
    def num_tokens(self) -> int:
        return int((self.rows[:, 2] - self.rows[:, 1]).sum())

    def share_ending_with(self, stop_ids: Sequence[int]) -> float:
        """How many of the chats ask for a stop token as the last thing the assistant says, as a fraction."""
        ends = 0
        for row in self:
            ends += int(row["input_ids"][np.flatnonzero(row["said"])[-1]]) in stop_ids
        return ends / len(self)


def tokenize_chats(
    ctx: Context, path: Path, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int
) -> tuple[Chats, Ledger]:
    """The chats of `path` in at most `max_length_tokens` each, and what was dropped; the same in every process.

    Each process tokenizes its share into the step's work folder; what is there from before a restart is used again.
    Raises `Preempted` if asked to stop, and `DataError` if no chat is left.
    """
    join_processes(ctx)
    world = ctx.world
    key = from_main(lambda: digest_of(path, tokenizer, max_length_tokens))
    folders = [ctx.work / "chats" / f"{path.stem}-{key}-{rank}-of-{world.size}" for rank in range(world.size)]
    mine = folders[world.rank]
    if not from_main(lambda: all(folder.exists() for folder in folders)):
        rows = list(read_rows(path))
        part = Part()
        for start in range(0, len(rows), CHATS_PER_ROUND * world.size):
            if any_process(ctx.stop_requested()):
                raise Preempted
            for index in range(start + world.rank, min(start + CHATS_PER_ROUND * world.size, len(rows)), world.size):
                part.add(index, rows[index], tokenizer, max_length_tokens)
            done = min(start + CHATS_PER_ROUND * world.size, len(rows))
            ctx.journal.write("progress", what=f"{path.stem} chats tokenized", done=done, total=len(rows))
        shutil.rmtree(mine, ignore_errors=True)
        part.write(mine)
        barrier()
    chats, ledger = Chats(folders), read_ledger(folders)
    ledger.kept = len(chats)
    if not len(chats):
        raise DataError(
            Problem(
                str(path),
                f"none of the {ledger.read:,} chats can be used: {dict(ledger.dropped)}",
                "Look at the rows, or raise max_length_tokens.",
            )
        )
    return chats, ledger


def digest_of(path: Path, tokenizer: PreTrainedTokenizerBase, max_length_tokens: int) -> str:
    """Changes with the rows, with what makes tokens of them, and with where they are cut."""
    parts = [digest_file(path), tokenizer_digest(tokenizer), chat_template_digest(tokenizer), max_length_tokens]
    return digest_bytes(canonical_json(parts))[:12]


def read_ledger(folders: Sequence[Path]) -> Ledger:
    """What all parts together read and dropped, in the order of the file."""
    counts = [json.loads((folder / "counts.json").read_bytes()) for folder in folders]
    ledger = Ledger(read=sum(each["read"] for each in counts))
    for _, reason, example in sorted(tuple(drop) for each in counts for drop in each["dropped"]):
        ledger.drop(reason, example)
    if shortened := sum(each["shortened"] for each in counts):
        ledger.repaired[SHORTENED] = shortened
    return ledger


def collate_chats(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and targets: the next token, where the assistant says it.

    Padded on the right. What is padding is told by position: the id that fills it may well occur in the chats.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        length = max(len(row["input_ids"]) for row in rows)
        ids_BT = torch.full((len(rows), length), padding_id)
        mask_BT, said_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            end = len(row["input_ids"])
            ids_BT[index, :end] = torch.from_numpy(np.array(row["input_ids"], dtype=np.int64))
            said_BT[index, :end] = torch.from_numpy(np.array(row["said"], dtype=np.int64))
            mask_BT[index, :end] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT, TARGETS: next_tokens(ids_BT, said_BT)}

    return collate
