"""Masks by hashing: their rate, their independence, what they are functions of; and attention with a given mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from stages.lib.formulas.attention import dropped_attention
from stages.lib.formulas.dropout_masks import keep_mask, scramble, signed, uniform


def keys(count: int, seed: int = 0) -> torch.Tensor:
    """Keys that differ in a few low bits, the hardest case for a hash."""
    return torch.arange(seed, seed + count, dtype=torch.int64)


def test_the_hash_is_the_mixer_on_unsigned_numbers() -> None:
    """Worked out here on Python's whole numbers, modulo 2^64."""
    values = [0, 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    expected = []
    for value in values:
        for factor in (0xD6E8FEB86659FD93, 0xD6E8FEB86659FD93, 1):
            value = (value ^ value >> 32) * factor % 2**64
        expected.append(signed(value))
    assert scramble(torch.tensor([signed(value) for value in values])).tolist() == expected


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_kept_in_every_lane_row_and_place(rate: float) -> None:
    """Of n places n (1 - rate) are kept, with a deviation of sqrt(n rate (1 - rate)); 5 deviations are met once in 10^6 times."""
    kept = keep_mask(keys(64), (32, 256), rate).double()

    def require(part: torch.Tensor, n: int) -> None:
        deviation = math.sqrt(rate * (1 - rate) / n)
        assert float((part - (1 - rate)).abs().max()) < 5.5 * deviation

    require(kept.mean(), kept.numel())
    require(kept.mean(dim=(1, 2)), 32 * 256)
    require(kept.mean(dim=(0, 2)), 64 * 256)
    require(kept.mean(dim=(0, 1)), 64 * 32)


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("apart", [1, 2, 4, 8])
def test_neighbours_are_independent(dimension: int, apart: int) -> None:
    """The correlation of n independent pairs has the deviation 1 / sqrt(n)."""
    kept = keep_mask(keys(64), (64, 256), 0.3).double() - 0.7
    size = kept.shape[dimension] - apart
    one, other = kept.narrow(dimension, 0, size), kept.narrow(dimension, apart, size)
    correlation = float((one * other).mean() / 0.21)
    assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_a_mask_is_a_function_of_the_key_and_the_coordinates() -> None:
    """Other rows beside it, their order, and longer dimensions change nothing of a row's mask."""
    whole = keep_mask(keys(5), (4, 9, 13), 0.4)
    assert torch.equal(keep_mask(keys(5)[[3, 1]], (4, 9, 13), 0.4), whole[[3, 1]])
    assert torch.equal(keep_mask(keys(5), (2, 7, 6), 0.4), whole[:, :2, :7, :6])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert keep_mask(keys(5), (), 0.4).shape == (5,)


def test_the_ends_of_the_range() -> None:
    assert bool(keep_mask(keys(3), (7,), 0.0).all())
    assert not bool(keep_mask(keys(3), (7,), 1.0).any())


def test_single_numbers_lie_evenly() -> None:
    """The mean of n numbers from 0 to 1 is 1/2, with the deviation 1 / sqrt(12 n)."""
    numbers = [uniform(key) for key in range(4000)]
    assert min(numbers) >= 0 and max(numbers) < 1 and len(set(numbers)) == 4000
    assert abs(sum(numbers) / 4000 - 0.5) < 5 / math.sqrt(12 * 4000)
    assert uniform(7) == numbers[7]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "pairs": {"attn_mask": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.4},
    "added": {"attn_mask": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))},
}


@pytest.mark.parametrize("call", CALLS)
def test_attention_is_that_of_torch_where_nothing_is_dropped(call: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options = CALLS[call]
    if call == "pairs":
        options = {"attn_mask": options["attn_mask"] | torch.eye(6, dtype=torch.bool)}  # each sees itself
    query = torch.randn(2, 4, 6, 8, generator=generator)
    key, value = (torch.randn(2, 2 if call == "grouped" else 4, 6, 8, generator=generator) for _ in range(2))
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    found = dropped_attention(query, key, value, **options, drop=lambda probabilities: probabilities)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dropped_probabilities_are_those_of_the_mask() -> None:
    """With values of one-hot vectors the output is the matrix of probabilities: softmax of equal scores is 1/4 each."""
    zeros, kept = torch.zeros(1, 1, 4, 4), torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = dropped_attention(
        zeros, zeros, torch.eye(4)[None, None], drop=lambda probabilities: probabilities * kept * 2
    )
    assert torch.equal(found[0, 0], kept / 2)
