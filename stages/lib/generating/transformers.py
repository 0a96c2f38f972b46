"""Completions by the policy itself, with transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stages.lib.generating.sampling import Sampled, sample
from stages.lib.training.engine import Engine
from stages.lib.training.layouts import zero_stage_of


@dataclass(frozen=True)
class TransformersSampler:
    """A model of transformers."""

    model: PreTrainedModel
    rounding: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """The arithmetic that it calls for."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms_BK: NDArray[np.float64],
        *,
        stop_ids: Sequence[int],
        temperature: float,
    ) -> list[Sampled]:
        """A completion of each prompt."""
        with self.rounding():
            return sample(self.model, prompts, uniforms_BK, stop_ids=stop_ids, temperature=temperature)


class TransformersGenerator:
    """The policy as generation wants it: whole in every process, however it is split in training.

    Under ZeRO-3, and where it writes beside its training, this is a replica, whose weights are brought up to date once before
    each phase of generation, and not gathered for every token. On a GPU it waits in the host's memory while nothing is written.
    """

    def __init__(
        self,
        engine: Engine,
        policy: PreTrainedModel,
        make_replica: Callable[[], PreTrainedModel],
        *,
        beside_training: bool = False,
    ) -> None:
        self.engine = engine
        self.policy = policy
        resources = engine.ctx.resources
        self.chunk_size = resources.generation_batch_size or resources.micro_batch_size or 2**31
        """Completions that are written at once."""
        self.replica: PreTrainedModel | None = None
        if beside_training or zero_stage_of(engine.layout) == 3:
            self.replica = make_replica().to(next(iter(policy.parameters())).dtype).requires_grad_(False).eval()

    @contextlib.contextmanager
    def ready(self) -> Iterator[TransformersSampler]:
        """The model to generate with. All processes enter together."""
        if self.replica is None:
            training = self.policy.training
            self.policy.eval()
            try:
                yield TransformersSampler(self.policy, self.engine.rounding)
            finally:
                self.policy.train(training)
            return
        try:
            yield self.snapshot()
        finally:
            self.put_away()

    def snapshot(self) -> TransformersSampler:
        """The replica with the policy's present weights, which training does not change. All processes call it together."""
        assert self.replica is not None
        self.replica.to(self.engine.device)
        self.engine.copy_weights(self.policy, self.replica)
        return TransformersSampler(self.replica, self.engine.rounding)

    def put_away(self) -> None:
        """Frees the GPU of the replica."""
        if self.replica is not None and self.engine.device.type != "cpu":
            self.replica.to("cpu")
