"""Dropout masks that are a function of (key of the row, place in the row), and of nothing else.

A generator that is read one number after the other gives a row other numbers where more rows stand before it, or where it
is padded. Here each place is hashed: its number depends on the row's key and on its coordinates, never on sizes. So a row
has the same mask alone and among others, and whatever is filled up behind its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 4
"""Numbers of 16 bits in a hash of 64."""
STEPS = 1 << 16
"""Different values of such a number: rates are rounded to a multiple of 1 / 65,536."""


def signed(value: int) -> int:
    """The whole number modulo 2^64, as torch's int64 holds it."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
MULTIPLIER = signed(0xD6E8FEB86659FD93)


def scramble(state: Tensor) -> Tensor:
    """Each number of the contiguous int64 tensor hashed, in place: a bijection in which every bit decides every other.

    x ^= x >> 32, x *= m, x ^= x >> 32, x *= m, x ^= x >> 32 (the 64-bit mixer of Degski, in the form of Steele et al., 2014,
    "Fast splittable pseudorandom number generators"). The shifts go over halves of 32 bits, which torch shifts without sign.
    """
    halves = state.view(torch.int32)
    low, high = halves[..., 0::2], halves[..., 1::2]
    low ^= high
    state *= MULTIPLIER
    low ^= high
    state *= MULTIPLIER
    low ^= high
    return state


def derived(keys: Tensor, count: int) -> Tensor:
    """`count` keys of each of the keys, in one more dimension: the hash of key + (i + 1) x GOLDEN, as SplitMix64 counts."""
    counted = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return scramble((keys[..., None] + counted).contiguous())


def keep_mask(keys_S: Tensor, shape: Sequence[int], rate: float) -> Tensor:
    """True with the probability 1 - `rate`, of the shape S x `shape`: one mask per key, int64, on the keys' device.

    The value at a place depends on the key and on the place's coordinates: a larger shape only adds places at the ends.
    """
    lowest = round(rate * STEPS)
    whole = (len(keys_S), *shape)
    if lowest >= STEPS:
        return torch.zeros(whole, dtype=torch.bool, device=keys_S.device)
    keys = keys_S
    for size in shape[:-1]:
        keys = derived(keys, size)
    width = shape[-1] if shape else 1
    numbers = derived(keys, math.ceil(width / LANES)).view(torch.int16)
    kept: Tensor = numbers[..., :width] >= lowest - STEPS // 2
    return kept if shape else kept[..., 0]


def uniform(key: int) -> float:
    """A number from 0 (included) to 1 (excluded) that is a function of the key, with 53 bits."""
    (hashed,) = derived(torch.tensor([signed(key)]), 1).flatten().tolist()
    return ((hashed % (1 << 64)) >> 11) / (1 << 53)
