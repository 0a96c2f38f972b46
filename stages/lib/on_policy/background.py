"""The next rollout's completions, written while the policy learns: by its weights as they were when that began.

They are written in a thread of their own, by a copy of the policy, and are judged and learned from one rollout later. What the
policy has learned in between is corrected as other differences between generation and training are: each token is weighted
with the ratio of both probabilities, at most `mismatch_cap` (as in AReaL, Fu et al. 2025, and verl's one-step-off-policy).

Nothing of it depends on when the thread gets its turn: weights, prompts and random numbers are those of the moment in which
it begins, and a checkpoint waits for it and keeps what it wrote.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.stage import Context
from stages.lib.generating.transformers import TransformersGenerator
from stages.lib.on_policy.experience import Episode, Experience
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Parts
from stages.lib.on_policy.rollout import Rollouts
from stages.lib.processes.collectives import from_all
from stages.lib.processes.contained import Abandoned
from stages.lib.processes.joining import use_threads
from stages.lib.text.prompts import PromptRow


def background_of(ctx: Context, params: OnPolicyParams, parts: Parts, rollouts: Rollouts) -> Background | None:
    """What writes in the background; None where a recipe does not ask for it."""
    if not params.background_rollouts:
        return None
    assert isinstance(parts.generator, TransformersGenerator)
    return Background(ctx, rollouts, parts.generator)


class Background:
    """Writes completions beside what this process does meanwhile. Its processes begin, finish and abandon together."""

    def __init__(self, ctx: Context, rollouts: Rollouts, generator: TransformersGenerator) -> None:
        self.ctx = ctx
        self.rollouts = rollouts
        self.generator = generator
        self.thread: threading.Thread | None = None
        self.written: list[Episode] = []
        self.error: BaseException | None = None
        self.abandoned = False
        self.seconds = 0.0

    def begin(self, rows: Sequence[PromptRow], positions: Sequence[int], seed: int) -> None:
        """Has completions of these prompts written, by the policy of this moment, each process its share."""
        mine = self.rollouts.share_of(len(rows))
        my_rows, my_positions = [rows[index] for index in mine], [positions[index] for index in mine]
        sampler = self.generator.snapshot()
        self.written, self.error, self.seconds = [], None, 0.0

        def write() -> None:
            started = time.monotonic()
            try:
                # What a process sets up of these is its first thread's alone.
                use_threads(self.ctx.resources)
                if self.generator.engine.device.type == "cuda":
                    torch.cuda.set_device(self.generator.engine.device)
                with self.heeding(sampler.model):
                    self.written = self.rollouts.write_alone(sampler, my_rows, my_positions, seed)
            except BaseException as error:  # told in the thread that waits
                self.error = error
            self.seconds = time.monotonic() - started

        self.thread = threading.Thread(target=write, name="background rollout", daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def heeding(self, model: nn.Module) -> Iterator[None]:
        """Within it the model raises `Abandoned` at the next token once it is not waited for any more."""

        def stop(*_: Any) -> None:
            if self.abandoned:
                raise Abandoned("not waited for any more")

        with contextlib.ExitStack() as hooks:
            for each in model.modules():
                if isinstance(each, PreTrainedModel):
                    hooks.callback(each.register_forward_pre_hook(stop).remove)
            yield

    def finish(self) -> tuple[Experience, float] | None:
        """What was begun, whole in every process, and the seconds that writing took in this one; None if nothing was begun."""
        if self.thread is None:
            return None
        while self.thread.is_alive():
            self.thread.join(timeout=1.0)
            self.ctx.going_on_alone()
        self.thread = None
        self.generator.put_away()
        if self.error is not None:
            raise self.error
        found = {each.position: each for part in reversed(from_all(self.written)) for each in reversed(part)}
        return Experience(list(found.values())), self.seconds

    def abandon(self) -> None:
        """Ends what was begun and not finished, at its next token. Each process by itself."""
        self.abandoned = True
        if self.thread is not None:
            self.thread.join()
            self.thread = None
