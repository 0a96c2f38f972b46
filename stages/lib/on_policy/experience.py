"""What a policy wrote in one rollout and what came of it: kept whole in every process, and on disk within a checkpoint.

N: completions of the rollout, K: tokens of the longest one. Completions are few beside weights and activations, so each
process holds all of them: whitening covers all of them, and minibatches do not depend on how they are spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.lib.formulas.token_losses import Tensors
from stages.lib.on_policy.contained_calls import Trouble
from stages.lib.text.batches import padded
from stages.lib.training.scheduling import seed_of

PER_TOKEN = ("generator_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns")
"""Fields of an episode with one number per token of its completion. A reference and a critic may be missing: zeros."""


@dataclass(frozen=True)
class Unfolded:
    """How an episode of several turns went. Told once, and in no checkpoint."""

    turns: tuple[Mapping[str, str], ...]
    """The messages between the prompt and the last turn."""
    last: str
    """The text of the last turn."""
    troubles: tuple[Trouble, ...] = ()
    """What went wrong with the function that observes."""
    num_cut: int = 0
    """Observations of which the end was cut off."""
    is_cut_short: bool = False
    """Whether it ended because what was observed did not fit."""

    @property
    def num_turns(self) -> int:
        """Those of the policy."""
        return 1 + len(self.turns) // 2


@dataclass(frozen=True)
class Episode:
    """One completion. Its position in the schedule decides its prompt and its random numbers."""

    position: int
    row_index: int
    prompt_ids: NDArray[np.int64]
    ids: NDArray[np.int64]
    ended: bool
    rewards: NDArray[np.float64]
    """The value of each reward, without weights."""
    generator_logprobs: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    ref_logprobs: NDArray[np.float32]
    values: NDArray[np.float32]
    advantages: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    returns: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    troubles: Mapping[str, Trouble] = field(default_factory=dict)
    """What went wrong with it, by the name of the reward. Told once, and in no checkpoint."""
    observed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    """Which of `ids` the policy did not write, but read between two turns; empty where it wrote them all."""
    unfolded: Unfolded | None = None
    """None where the stage has no episodes of several turns."""

    @property
    def said(self) -> NDArray[np.float64]:
        """1 for each token that the policy wrote, and 0 for those that it read."""
        return np.ones(len(self.ids)) if not len(self.observed) else 1.0 - self.observed

    @property
    def num_said(self) -> int:
        return len(self.ids) - int(self.observed.sum())


class Experience:
    """The episodes of a rollout in the order of their positions."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = sorted(episodes, key=lambda each: each.position)

    def __len__(self) -> int:
        return len(self.episodes)

    def padded(self, name: str) -> Tensor:
        """N x K in double precision, 0 behind the end of each completion."""
        return padded([getattr(each, name) for each in self.episodes], dtype=np.float64)

    @property
    def mask(self) -> Tensor:
        """N x K in double precision: 1 for the tokens of completions that the policy wrote."""
        return padded([each.said for each in self.episodes], dtype=np.float64)

    @property
    def lengths(self) -> Tensor:
        """How many tokens the policy wrote of each. N."""
        return torch.tensor([each.num_said for each in self.episodes], dtype=torch.float64)

    @property
    def ended(self) -> Tensor:
        return torch.tensor([each.ended for each in self.episodes], dtype=torch.float64)

    @property
    def rewards(self) -> Tensor:
        """N x the number of rewards."""
        return torch.from_numpy(np.stack([each.rewards for each in self.episodes]))

    def with_advantages(self, advantages_NK: Tensor, returns_NK: Tensor) -> Experience:
        """The same episodes, each with what its tokens were worth."""
        return Experience(
            [
                replace(
                    each,
                    advantages=advantages[: len(each.ids)].float().numpy(),
                    returns=returns[: len(each.ids)].float().numpy(),
                )
                for each, advantages, returns in zip(self.episodes, advantages_NK, returns_NK, strict=True)
            ]
        )

    def minibatches(
        self, seed: int, rollout: int, epoch: int, size: int, *, completions_per_row: int = 1
    ) -> list[list[int]]:
        """The episodes of each minibatch of a pass, `size` rows of so many successive episodes: an order that is a function of
        (seed, rollout, epoch).
        """
        num_rows = len(self) // completions_per_row
        order = np.random.Generator(np.random.PCG64(seed_of(seed, rollout, epoch))).permutation(num_rows)
        rows = [range(int(row) * completions_per_row, (int(row) + 1) * completions_per_row) for row in order]
        return [[index for row in rows[start : start + size] for index in row] for start in range(0, num_rows, size)]

    def save(self, path: Path) -> None:
        """Writes the episodes as arrays: those of all completions one after the other, and where each begins."""
        prompts = [len(each.prompt_ids) for each in self.episodes]
        arrays: dict[str, Any] = {
            "positions": [each.position for each in self.episodes],
            "row_indices": [each.row_index for each in self.episodes],
            "ended": [each.ended for each in self.episodes],
            "rewards": np.stack([each.rewards for each in self.episodes]),
            "prompt_lengths": prompts,
            "lengths": [len(each.ids) for each in self.episodes],
            "prompt_ids": np.concatenate([each.prompt_ids for each in self.episodes]),
            "ids": np.concatenate([each.ids for each in self.episodes]),
        }
        arrays |= {name: np.concatenate([getattr(each, name) for each in self.episodes]) for name in PER_TOKEN}
        if any(len(each.observed) for each in self.episodes):
            arrays["observed"] = np.concatenate([each.said == 0 for each in self.episodes])
        np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})

    @classmethod
    def load(cls, path: Path) -> Experience:
        """The episodes that `save` wrote. Raises `KeyError` or `ValueError` where the file holds something else."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        require_episodes(arrays)
        prompt_ids = np.split(arrays["prompt_ids"], np.cumsum(arrays["prompt_lengths"])[:-1])
        split = {name: np.split(arrays[name], np.cumsum(arrays["lengths"])[:-1]) for name in ("ids", *PER_TOKEN)}
        observed = [np.zeros(0, dtype=np.bool_)] * len(arrays["positions"])
        if "observed" in arrays:
            parts = np.split(arrays["observed"], np.cumsum(arrays["lengths"])[:-1])
            observed = [each if each.any() else each[:0] for each in parts]
        return cls(
            [
                Episode(
                    position=int(arrays["positions"][index]),
                    row_index=int(arrays["row_indices"][index]),
                    prompt_ids=prompt_ids[index],
                    ended=bool(arrays["ended"][index]),
                    rewards=arrays["rewards"][index],
                    observed=observed[index],
                    **{name: parts[index] for name, parts in split.items()},
                )
                for index in range(len(arrays["positions"]))
            ]
        )


def require_episodes(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raises `KeyError` or `ValueError` where arrays are not those of episodes: a name, a type or a length."""
    number = len(arrays["positions"])
    prompts, tokens = int(arrays["prompt_lengths"].sum()), int(arrays["lengths"].sum())
    whole, real = (np.integer, np.bool_), (np.floating,)
    wanted: dict[str, tuple[tuple[type, ...], tuple[int, ...]]] = {
        **dict.fromkeys(("positions", "row_indices", "ended", "prompt_lengths", "lengths"), (whole, (number,))),
        "prompt_ids": (whole, (prompts,)),
        "ids": (whole, (tokens,)),
        "rewards": (real, (number,)),
        **dict.fromkeys(PER_TOKEN, (real, (tokens, 0))),  # none where nothing has been asked for them yet
        **({"observed": (whole, (tokens,))} if "observed" in arrays else {}),
    }
    for name, (kinds, lengths) in wanted.items():
        array = arrays[name]
        if not issubclass(array.dtype.type, kinds) or array.ndim != 1 + (name == "rewards"):
            raise ValueError(f"{name} is an array of another kind")
        if len(array) not in lengths:
            raise ValueError(f"{name} has {len(array)} numbers")


def collate_episodes(episodes: Sequence[Episode], padding_id: int) -> Tensors:
    """`input_ids` and `attention_mask`, B x (P + K), and B x K in float32: `mask` and every field of `PER_TOKEN` there is.

    Prompts are padded on the left and completions on the right, so that all completions begin at the same place. `mask` is 1
    for the tokens that the policy wrote; all tokens are attended to.
    """
    prompt_length = max(len(each.prompt_ids) for each in episodes)
    new_length = max(len(each.ids) for each in episodes)
    ids_BT = torch.full((len(episodes), prompt_length + new_length), padding_id)
    attended_BT = torch.zeros_like(ids_BT)
    for row, each in enumerate(episodes):
        begin, end = prompt_length - len(each.prompt_ids), prompt_length + len(each.ids)
        ids_BT[row, begin:prompt_length] = torch.from_numpy(each.prompt_ids)
        ids_BT[row, prompt_length:end] = torch.from_numpy(each.ids)
        attended_BT[row, begin:end] = 1
    batch = {"input_ids": ids_BT, "attention_mask": attended_BT}
    batch["mask"] = padded([each.said for each in episodes], dtype=np.float32)
    for name in PER_TOKEN:
        rows = [getattr(each, name) for each in episodes]
        if all(len(row) == len(each.ids) for row, each in zip(rows, episodes, strict=True)):
            batch[name] = padded(rows, dtype=np.float32)
    return batch
