"""What writes a policy's completions while it is trained: the models of transformers do (transformers.py), or vLLM (vllm.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stages.lib.generating.sampling import Sampled


class Sampler(Protocol):
    """A model with the policy's present weights."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms_BK: NDArray[np.float64],
        *,
        stop_ids: Sequence[int],
        temperature: float,
    ) -> list[Sampled]:
        """A completion of each prompt, of at most K tokens, that depends on nothing but the weights and its K numbers."""


class Generator(Protocol):
    """The policy as generation wants it."""

    chunk_size: int
    """Completions that are asked for at once."""

    def ready(self) -> AbstractContextManager[Sampler]:
        """What completions are asked of. All processes enter together."""
