"""The rows of training in their order, which is a function of (seed, position) alone, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class ScheduledData(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows in training order: position p is row `permutation(seed, p // N)[p % N]`, and nothing else decides."""

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int, length: int) -> None:
        self.rows = rows
        self.seed = seed
        self.length = length
        self.permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < self.length:
            raise IndexError(position)
        return {**self.rows[self.index(position)], "position": position}

    def index(self, position: int) -> int:
        """Which row stands at `position`."""
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self.permutations:
            # At most two are kept: a batch may reach over the end of a pass.
            self.permutations = {e: p for e, p in self.permutations.items() if e >= epoch - 1}
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.permutations[epoch] = generator.permutation(len(self.rows))
        return int(self.permutations[epoch][place])


def fingerprint(rows: Sequence[dict[str, Any]], samples: int = 64) -> str:
    """A digest of the number of rows and of the content of `samples` of them, evenly spread."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in sorted({int(i) for i in np.linspace(0, len(rows) - 1, min(samples, len(rows)))}):
        for name, value in sorted(rows[index].items()):
            digest.update(name.encode())
            digest.update(value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
    return digest.hexdigest()


def seed_of(*parts: int) -> int:
    """A seed of 63 bits that depends on every part."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
