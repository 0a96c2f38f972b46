"""Rows as tokens on disk: tokenized once, by all processes together, and read back by each from memory maps.

Process r of n makes tokens of every n-th row, from row r on, and writes them as one part into the step's work folder:

    ids.npy        int32, the ids of all its sequences, one after the other
    mask.npy       uint8, one beside each id
    table.npy      int64, of each row kept: its number in the file, where each of its sequences begins in `ids`, and the end
    <column>.npy   what else is known of each row kept
    counts.json    how many rows were read and shortened, and which were dropped, why

What a row becomes is the caller's to say: chats, pairs and prompts differ in nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Preempted, Problem
from pipeline.stage import Context
from pipeline.store.artifact import canonical_json, digest_bytes, digest_file
from pipeline.store.durable import replacing_folder
from pipeline.store.numbers import json_text
from stages.lib.processes.collectives import any_process, barrier, from_main
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import Row, read_rows
from stages.lib.rows.ledger import Ledger, add_ledgers
from stages.lib.text.template_date import told_date
from stages.lib.text.tokenizers import chat_template_digest, tokenizer_digest

LAYOUT = 2
"""Raised when parts are written in another way: those from before a restart are then made anew."""


ROWS_PER_ROUND = 256
"""After so many rows in each process, all of them look whether they were asked to stop."""


SHORTENED = "oldest_turns_dropped"


EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class TokenizedRow:
    """What a row became: its sequences, or the `reason` why it is dropped and an example of what it says."""

    sequences: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    """The ids and the mask of each; as many in every row."""
    columns: Mapping[str, str | float] = field(default_factory=dict)
    """What else is known of it; the same names in every row."""
    repaired: Mapping[str, int] = field(default_factory=dict)
    """What was done to it, in words for the ledger, and how often."""
    reason: str = ""
    example: str = ""


@dataclass(frozen=True)
class Tokenizing:
    """How the rows of a file become tokens."""

    what: str
    """What the rows are called, in messages and in the work folder."""
    tokenizer: PreTrainedTokenizerBase
    make: Callable[[Row], TokenizedRow | Sequence[TokenizedRow]]
    """What a row becomes: one of the data set, or several."""
    limit: str
    """The param that says how long they may be, for messages."""
    settings: Sequence[Any]
    """What `make` depends on besides the tokenizer and the row."""

    def digest(self, path: Path) -> str:
        """Changes with the rows, with what makes tokens of them, and with the settings."""
        template = chat_template_digest(self.tokenizer)
        told = told_date().isoformat()
        parts = [LAYOUT, digest_file(path), tokenizer_digest(self.tokenizer), template, told, *self.settings]
        return digest_bytes(canonical_json(parts))[:12]


class TokenizedPart:
    """The rows that one process tokenizes."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.table: list[list[int]] = []
        self.columns: dict[str, list[str | float]] = {}
        self.dropped: list[tuple[int, str, str]] = []
        """(row of the file, reason, example)."""
        self.read = 0
        self.repaired: Counter[str] = Counter()

    def add(self, index: int, made: TokenizedRow | Sequence[TokenizedRow]) -> None:
        """Takes what row number `index` of the file became."""
        self.read += 1
        for row in [made] if isinstance(made, TokenizedRow) else made:
            self.add_row(index, row)

    def add_row(self, index: int, row: TokenizedRow) -> None:
        if row.reason:
            self.dropped.append((index, row.reason, row.example[:EXAMPLE_CHARACTERS]))
            return
        self.repaired.update(row.repaired)
        begins = []
        for ids, mask in row.sequences:
            begins.append(len(self.ids))
            self.ids += ids
            self.mask += mask
        self.table.append([index, *begins, len(self.ids)])
        for name, value in row.columns.items():
            self.columns.setdefault(name, []).append(value)

    def write(self, folder: Path) -> None:
        """Writes the part as a whole or not at all."""
        counts = {name: getattr(self, name) for name in ("dropped", "read", "repaired")}
        with replacing_folder(folder) as part:
            np.save(part / "ids.npy", np.asarray(self.ids, dtype=np.int32))
            np.save(part / "mask.npy", np.asarray(self.mask, dtype=np.uint8))
            np.save(part / "table.npy", np.asarray(self.table, dtype=np.int64))
            for name, values in self.columns.items():
                np.save(part / f"{name}.npy", np.asarray(values))
            text = json_text(counts | {"columns": list(self.columns)}, "counts.json")
            (part / "counts.json").write_text(text, encoding="utf-8")


class TokenizedRows:
    """The rows of a file that can be used, in its order. Their tokens stay on disk until a row is asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        counts = [json.loads((folder / "counts.json").read_bytes()) for folder in folders]
        self.ids = [np.load(folder / "ids.npy", mmap_mode="r") for folder in folders]
        self.mask = [np.load(folder / "mask.npy", mmap_mode="r") for folder in folders]
        tables = [np.load(folder / "table.npy") for folder in folders]
        # A part without rows does not know how many sequences a row has.
        filled = [number for number, table in enumerate(tables) if len(table)]
        tables = [np.insert(tables[number], 0, number, axis=1) for number in filled]
        together = np.concatenate(tables) if tables else np.zeros((0, 3), dtype=np.int64)
        order = np.argsort(together[:, 1], kind="stable")
        self.table: NDArray[np.int64] = together[order]
        """Part, row of the file, where each sequence begins in the part, and the end."""
        names = counts[filled[0]]["columns"] if filled else []
        self.columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([np.load(folders[number] / f"{name}.npy") for number in filled])[order]
            for name in names
        }
        self.ledger = ledger_of(counts, kept=len(np.unique(self.numbers)))

    def __len__(self) -> int:
        return len(self.table)

    def sequences(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The ids and the mask of each sequence of a row."""
        part, _, *places = (int(value) for value in self.table[index])
        return [(self.ids[part][begin:end], self.mask[part][begin:end]) for begin, end in pairwise(places)]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The number in the file of the row that each comes from."""
        return self.table[:, 1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Rows x sequences: the tokens of each."""
        return np.diff(self.table[:, 2:], axis=1)


def ledger_of(counts: Sequence[Mapping[str, Any]], kept: int) -> Ledger:
    """What all parts together read and dropped, in the order of the file."""
    ledger = Ledger(read=sum(each["read"] for each in counts), kept=kept)
    for _, reason, example in sorted(tuple(drop) for each in counts for drop in each["dropped"]):
        ledger.drop(reason, example)
    for each in counts:
        ledger.repaired.update(each["repaired"])
    return ledger


def tokenize_file(ctx: Context, path: Path, how: Tokenizing) -> TokenizedRows:
    """The rows of `path` as tokens, the same in every process.

    What is there from before a restart is used again. Raises `Preempted` if asked to stop, and `DataError` if no row is
    left.
    """
    join_processes(ctx)
    world = ctx.world
    digest = from_main(lambda: how.digest(path))
    folders = [ctx.work / how.what / f"{path.stem}-{digest}-{rank}-of-{world.size}" for rank in range(world.size)]
    if not from_main(lambda: all(folder.exists() for folder in folders)):
        tokenize_share(ctx, path, how).write(folders[world.rank])
        barrier()
    tokenized = TokenizedRows(folders)
    if not len(tokenized):
        ledger = tokenized.ledger
        too_long = any("too_long" in reason for reason in ledger.dropped)
        hint = (
            f"Look at the rows, or raise {how.limit}."
            if too_long
            else "Look at the rows, and at what they are made for."
        )
        raise DataError(
            Problem(str(path), f"none of the {ledger.read:,} {how.what} can be used: {ledger.why_dropped()}", hint)
        )
    return tokenized


def tokenize_share(ctx: Context, path: Path, how: Tokenizing) -> TokenizedPart:
    """This process's rows of `path`, made into tokens. Raises `Preempted`, in all processes, if one was asked to stop."""
    rows, world = list(read_rows(path)), ctx.world
    part = TokenizedPart()
    for start in range(0, len(rows), ROWS_PER_ROUND * world.size):
        if any_process(ctx.stop_requested()):
            raise Preempted
        end = min(start + ROWS_PER_ROUND * world.size, len(rows))
        for index in range(start + world.rank, end, world.size):
            part.add(index, how.make(rows[index]))
        ctx.journal.write("progress", what=f"{path.stem} {how.what} tokenized", done=end, total=len(rows))
    return part


def tokenize_input(
    ctx: Context, role: str, how: Tokenizing, max_dropped_fraction: float
) -> tuple[TokenizedRows, TokenizedRows, Ledger]:
    """Training and held-out rows of the input `role`, and the ledger of both, written to the artifact.

    Raises `DataError` if a larger share than `max_dropped_fraction` cannot be used, or no row of a side can.
    """
    train, heldout = (tokenize_file(ctx, ctx.inputs[role] / f"{split}.jsonl", how) for split in ("train", "heldout"))
    ledger = add_ledgers(train.ledger, heldout.ledger)
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items())) or "none"
    sides = f"{len(train):,} training and {len(heldout):,} held-out {how.what}"
    kept = ", ".join(f"{count:,} {what}" for what, count in sorted(ledger.repaired.items()))
    ctx.journal.note(f"{sides}; dropped of {ledger.read:,}: {said}{f'; of those kept: {kept}' if kept else ''}")
    if "strftime_now" in str(how.tokenizer.chat_template):
        ctx.journal.note(f"the chat template writes the day: it is told {told_date()} (template_date)")
    remedy = f"Raise {how.limit}, clean the {how.what}, or allow it with max_dropped_fraction."
    require_enough(ledger, max_dropped_fraction, f"inputs.{role}", how.what, remedy)
    from_main(lambda: ledger.write(ctx.out))
    return train, heldout, ledger


def require_enough(ledger: Ledger, max_dropped_fraction: float, where: str, what: str, remedy: str) -> None:
    """Raises `DataError` if a larger share of the rows than `max_dropped_fraction` was dropped."""
    share = 1 - ledger.kept / ledger.read
    if share > max_dropped_fraction:
        dropped = f"{share:.0%} of the {what} cannot be used: {ledger.why_dropped()}"
        raise DataError(Problem(where, dropped, remedy))
