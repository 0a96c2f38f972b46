"""Packed tokens on disk: documents one after the other in a flat array of ids, and blocks of it for training.

    train.tokens           ids, little-endian uint16 or uint32, nothing else
    train.documents.npy    int64: where each document starts, and where the last one ends
    heldout.tokens, heldout.documents.npy
    tokens.json            `TokensInfo`
    tokenizer/             the tokenizer that gave the ids

Block i is the tokens from `i * sequence_length` on, so that any block is found at once, whatever was read before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ArtifactError, Problem

INFO = "tokens.json"


Split = Literal["train", "heldout"]


class TokensInfo(BaseModel):
    """`tokens.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["uint16", "uint32"]
    sequence_length: int
    vocabulary_size: int
    tokenizer_digest: str
    bos_token_id: int | None
    """Put before each document; None if it was not."""
    eos_token_id: int | None
    """Put after each document; None if it was not."""
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int

    def tokens(self, split: Split) -> int:
        return self.train_tokens if split == "train" else self.heldout_tokens

    def documents(self, split: Split) -> int:
        return self.train_documents if split == "train" else self.heldout_documents


class Block(NamedTuple):
    """T = sequence_length consecutive tokens, all int64.

    `position_ids` count from 0 at the start of the block and of each document: where one is 0, attention must not look
    further back. `document_ids` number the documents of the split.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64]


def dtype_for(vocabulary_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type of the file that holds every id."""
    return "uint16" if vocabulary_size <= 65535 else "uint32"


class TokensWriter:
    """Appends documents to a split, with 8 bytes of memory for each. Leaving the `with` block finishes the files."""

    def __init__(self, folder: Path, split: Split, vocabulary_size: int) -> None:
        self.folder = folder
        self.split = split
        self.vocabulary_size = vocabulary_size
        self.dtype = np.dtype(dtype_for(vocabulary_size)).newbyteorder("<")
        self.starts = array("q", [0])
        self.file = (folder / f"{split}.tokens").open("wb")

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    def add(self, ids: Sequence[int]) -> None:
        """One document of at least one token."""
        values = np.asarray(ids, dtype=np.int64)
        assert values.size, "a document has at least one token"
        assert values.min() >= 0 and values.max() < self.vocabulary_size, "every id is in the vocabulary"
        self.file.write(values.astype(self.dtype).tobytes())
        self.starts.append(self.tokens + values.size)

    def __enter__(self) -> TokensWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        np.save(self.folder / f"{self.split}.documents.npy", np.frombuffer(self.starts, dtype=np.int64))


def read_info(folder: Path) -> TokensInfo:
    """What `tokens.json` says. Raises `ArtifactError` if it is missing or cannot be read."""
    path = folder / INFO
    try:
        return TokensInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            Problem(str(folder), f"holds no packed tokens: it has no {INFO}", "Name a pack stage.")
        ) from None
    except ValidationError as error:
        raise ArtifactError(Problem(str(path), f"cannot be read: {error.errors()[0]['msg']}", "Pack again.")) from None


class PackedTokens:
    """The blocks of one split: `len(packed)` of them, and `packed.block(i)` in the time of a binary search.

    Ids stay on disk until asked for. May be pickled, and used after a fork: each process maps the files by itself.
    Raises `ArtifactError` if the files are not as long as `tokens.json` says.
    """

    def __init__(self, folder: Path, split: Split = "train", sequence_length: int | None = None) -> None:
        self.folder = Path(folder)
        self.split: Split = split
        self.info = read_info(self.folder)
        self.sequence_length = sequence_length or self.info.sequence_length
        self.num_tokens = self.info.tokens(split)
        self.num_documents = self.info.documents(split)
        self.open()

    def open(self) -> None:
        dtype = np.dtype(self.info.dtype).newbyteorder("<")
        path, starts = self.folder / f"{self.split}.tokens", self.folder / f"{self.split}.documents.npy"
        try:
            size = path.stat().st_size
            if size != self.num_tokens * dtype.itemsize:
                raise ArtifactError(
                    Problem(
                        str(path), f"has {size:,} bytes instead of {self.num_tokens * dtype.itemsize:,}", "Pack again."
                    )
                )
            # A file of no bytes cannot be mapped.
            self.ids = np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
            self.starts: NDArray[np.int64] = np.load(starts, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(Problem(str(self.folder), f"cannot be opened: {error}", "Pack again.")) from None
        if self.starts.shape != (self.num_documents + 1,) or self.starts[-1] != self.num_tokens:
            raise ArtifactError(Problem(str(starts), f"does not belong to {path.name}", "Pack again."))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("ids", "starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open()

    def __len__(self) -> int:
        return self.num_tokens // self.sequence_length

    @property
    def dropped_tail_tokens(self) -> int:
        """The tokens after the last whole block, which no block holds."""
        return self.num_tokens % self.sequence_length

    def block(self, index: int) -> Block:
        """Block `index`, from 0 to `len(self) - 1`."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = index * self.sequence_length
        places = np.arange(begin, begin + self.sequence_length, dtype=np.int64)
        # Only the documents that the block touches are looked at.
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts, begin + self.sequence_length, side="left"))
        starts = np.asarray(self.starts[first:last], dtype=np.int64)
        within = np.searchsorted(starts, places, side="right") - 1
        positions = places - np.maximum(starts[within], begin)
        return Block(self.ids[begin : begin + self.sequence_length].astype(np.int64), positions, within + first)

    def document(self, index: int) -> NDArray[np.int64]:
        """The ids of one document, its bos and eos included."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.ids[int(self.starts[index]) : int(self.starts[index + 1])].astype(np.int64)


def facts_of_tokens(train: PackedTokens, heldout: PackedTokens) -> dict[str, int]:
    """What the manifest of a model says of the tokens it was trained on: `Facts(**facts_of_tokens(...), ...)`."""
    return {
        "max_length_tokens": train.sequence_length,
        "train_tokens": train.num_tokens,
        "heldout_tokens": heldout.num_tokens,
        "train_rows": len(train),
        "heldout_rows": len(heldout),
    }
