"""Seeds that fit the libraries that take them: a recipe's seed may be any whole number from 0."""

from __future__ import annotations

import hashlib

TORCH_BITS = 64
NUMPY_BITS = 32
"""numpy's global generator, which transformers' `set_seed` seeds along with the others."""


def bounded_seed(seed: int, bits: int) -> int:
    """The seed itself where it has at most so many bits, else so many bits of its digest."""
    if seed < 2**bits:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[: bits // 8], "big")
