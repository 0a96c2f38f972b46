"""Episodes: padded, collated, cut into minibatches, written and read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.on_policy.experience import PER_TOKEN, Episode, Experience, collate_episodes

SHAPES = [(2, 3), (4, 1), (1, 2), (3, 4), (2, 2)]
"""Tokens of prompt and completion."""


def episode(position: int, prompt_length: int, length: int, **fields: Any) -> Episode:
    """Its numbers are 100 position + 10 (the number of the field) + the place of the token."""

    def numbers(field: int) -> np.ndarray:
        return (100 * position + 10 * field + np.arange(length)).astype(np.float32)

    values = {name: numbers(field) for field, name in enumerate(PER_TOKEN)}
    return Episode(
        position=position,
        row_index=position % 2,
        prompt_ids=np.arange(prompt_length) + 50,
        ids=np.arange(length) + 60 + position,
        ended=position % 3 == 0,
        rewards=np.array([position + 0.1, -position]),
        **{**values, **fields},
    )


def episodes(**fields: Any) -> list[Episode]:
    return [episode(position, *shape, **fields) for position, shape in enumerate(SHAPES)]


def same(one: Episode, other: Episode) -> None:
    for field in dataclasses.fields(Episode):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert type(mine) is type(theirs), field.name
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, field.name
            assert mine.tolist() == theirs.tolist(), field.name
        else:
            assert mine == theirs, field.name


NOTHING = np.zeros(0, dtype=np.float32)


@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize(
    "fields", [{}, {"advantages": NOTHING, "returns": NOTHING}], ids=["with advantages", "without"]
)
def test_what_is_written_is_read(num: int, fields: dict[str, Any], tmp_path: Path) -> None:
    """Field by field, with its type; also before there are advantages."""
    experience = Experience(episodes(**fields)[:num])
    experience.save(tmp_path / "experience.npz")
    read = Experience.load(tmp_path / "experience.npz")
    assert len(read) == num
    for one, other in zip(experience.episodes, read.episodes, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("ids", None),
        ("positions", np.arange(4)),
        ("lengths", np.arange(5)),
        ("ids", np.ones(12)),
        ("logprobs", np.ones(3, dtype=np.float32)),
        ("rewards", np.ones(5)),
        ("rewards", np.full((5, 2), "high")),
        ("observed", np.ones(3, dtype=np.bool_)),
    ],
)
def test_arrays_that_are_not_those_of_episodes_are_refused(name: str, array: np.ndarray | None, tmp_path: Path) -> None:
    """A name that is missing, and a number, a type or a length that is another one."""
    path = tmp_path / "experience.npz"
    Experience(episodes()).save(path)
    arrays = {**np.load(path), name: array}
    np.savez(path, **{each: value for each, value in arrays.items() if value is not None})
    with pytest.raises((KeyError, ValueError)):
        Experience.load(path)


def test_episodes_stand_in_the_order_of_their_positions() -> None:
    assert [each.position for each in Experience(episodes()[::-1]).episodes] == [0, 1, 2, 3, 4]


def test_padded_fields_by_hand() -> None:
    experience = Experience(episodes()[:3])
    assert experience.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert experience.padded("logprobs").tolist() == [[10, 11, 12], [110, 0, 0], [210, 211, 0]]
    assert experience.lengths.tolist() == [3, 1, 2]
    assert experience.ended.tolist() == [1, 0, 0]
    assert experience.rewards.tolist() == [[0.1, 0], [1.1, -1], [2.1, -2]]
    tensors = (experience.mask, experience.padded("values"), experience.rewards)
    assert all(tensor.dtype == torch.float64 for tensor in tensors)


def test_advantages_go_to_their_tokens() -> None:
    """And nothing else changes."""
    experience = Experience(episodes(advantages=NOTHING, returns=NOTHING)[:3])
    advantages_NK, returns_NK = torch.arange(9.0).view(3, 3).double(), -torch.arange(9.0).view(3, 3).double()
    learned = experience.with_advantages(advantages_NK, returns_NK)
    assert [each.advantages.tolist() for each in learned.episodes] == [[0, 1, 2], [3], [6, 7]]
    assert [each.returns.tolist() for each in learned.episodes] == [[0, -1, -2], [-3], [-6, -7]]
    for before, after in zip(experience.episodes, learned.episodes, strict=True):
        same(before, dataclasses.replace(after, advantages=NOTHING, returns=NOTHING))


@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_minibatches_are_a_partition(size: int) -> None:
    """Every episode stands in one minibatch of each pass, and only the last one can be short."""
    experience = Experience([episode(position, 1, 1) for position in range(12)])
    minibatches = experience.minibatches(seed=1, rollout=2, epoch=3, size=size)
    assert sorted(index for minibatch in minibatches for index in minibatch) == list(range(12))
    assert {len(minibatch) for minibatch in minibatches[:-1]} <= {size}


def test_minibatches_are_a_function_of_seed_rollout_and_epoch() -> None:
    """Each of the three gives another order, and (2, 1) another than (1, 2)."""
    experience = Experience([episode(position, 1, 1) for position in range(12)])
    first = experience.minibatches(0, 1, 2, 4)
    assert Experience(experience.episodes[::-1]).minibatches(0, 1, 2, 4) == first
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1), (1, 0, 2)):
        assert experience.minibatches(*other, 4) != first


def test_collated_episodes_by_hand() -> None:
    """Prompts of 2 and 4 tokens and completions of 3 and 1: padded on the left to 4, and on the right to 3."""
    batch = collate_episodes(episodes()[:2], padding_id=9)
    assert batch["input_ids"].tolist() == [[9, 9, 50, 51, 60, 61, 62], [50, 51, 52, 53, 61, 9, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    for field, name in enumerate(PER_TOKEN):
        expected = [[10 * field, 10 * field + 1, 10 * field + 2], [100 + 10 * field, 0, 0]]
        assert batch[name].tolist() == expected, name
        assert batch[name].dtype == torch.float32


def test_what_is_not_known_yet_is_not_collated() -> None:
    batch = collate_episodes(episodes(advantages=NOTHING, returns=NOTHING), padding_id=9)
    assert set(batch) == {"input_ids", "attention_mask", "mask", *PER_TOKEN} - {"advantages", "returns"}
