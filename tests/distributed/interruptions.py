"""Moments of on-policy training at which a process kills itself with SIGKILL or is asked to stop, seen from outside.

`Job.die` with `during` one of

- generation: {"rollout": r, "chunk": c, "token": t}: while the t-th token of the c-th batch of completions is drawn
- update: {"step": s, "micro_batch": m}: before the m-th backward pass of step s; after the optimizer where there is none
- checkpoint: {"step": s, "file": f}: with half of f written: weights, experience, state or list

and a `rank`, which process it is. `Job.stop` is {"rollout": r, "chunk": c} (before that batch), {"step": s} (after it), or
{"during": "scoring", "scored": r, "asked": n} (when asked for the n-th time while the completions of rollout r are scored).
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipeline.store.checkpoints import COMPLETE, Checkpoints
from stages.lib.generating import sampling
from stages.lib.generating.transformers import TransformersSampler
from stages.lib.on_policy import loop as on_policy
from stages.lib.on_policy.experience import Experience
from stages.lib.on_policy.learning import Learner
from stages.lib.training import state as training_state
from stages.lib.training.engine import Engine

UNWATCHED = (
    TransformersSampler.sample,
    sampling.DrawByUniforms.__call__,
    on_policy.Aligner.collect,
    Learner.optimize,
    Engine.backward,
    Engine.step,
    Engine.save,
    torch.save,
    Experience.save,
    training_state.write_state,
    Checkpoints.complete,
)


class Place:
    """Where the run is."""

    rollout = -1
    """The rollout whose completions are being written; -1 otherwise, also for held-out ones."""
    chunk = -1
    """Number of the last batch of completions in it that was begun."""
    step = 0
    """The optimizer step that is being taken, or was the last to be taken, counted from 1."""
    micro_batch = 0


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def halve(path: Path) -> NoReturn:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    kill()


def stop_is_due(stop: Mapping[str, Any]) -> bool:
    if "rollout" in stop:
        # `chunk` is that of the batch that is done: the request comes before the next.
        return Place.rollout == stop["rollout"] and Place.chunk + 1 >= stop["chunk"]
    return bool(Place.step >= stop.get("step", sys.maxsize))


def watch(die: Mapping[str, Any], is_it: bool) -> None:
    """Lets this process, if it is the one, die where `die` says; counts in any case."""
    (sample, draw, collect, optimize, backward, step, save_engine, save, save_experience, write_state, complete) = (
        UNWATCHED
    )
    during = die.get("during") if is_it else None
    Place.rollout, Place.chunk, Place.step, Place.micro_batch = -1, -1, 0, 0

    def in_that_batch() -> bool:
        return during == "generation" and (Place.rollout, Place.chunk) == (die["rollout"], die["chunk"])

    def watched_collect(self: Any, rollout: int) -> None:
        Place.rollout, Place.chunk = rollout, -1
        collect(self, rollout)
        Place.rollout = -1

    def watched_sample(*arguments: Any, **options: Any) -> Any:
        Place.chunk += 1
        found = sample(*arguments, **options)
        if in_that_batch():  # all completions had ended before the token
            kill()
        return found

    def watched_draw(self: Any, input_ids: Any, scores: Any) -> Any:
        if in_that_batch() and input_ids.shape[1] - self.prompt_length == die["token"]:
            kill()
        return draw(self, input_ids, scores)

    def watched_optimize(self: Any, experience: Any, chosen: Any, number: int) -> Any:
        Place.step, Place.micro_batch = number + 1, 0
        return optimize(self, experience, chosen, number)

    def in_that_step() -> bool:
        return during == "update" and Place.step == die["step"]

    def watched_backward(self: Any, make_loss: Any, *, last: bool) -> None:
        if in_that_step() and Place.micro_batch == die["micro_batch"]:
            kill()
        backward(self, make_loss, last=last)
        Place.micro_batch += 1

    def watched_step(self: Any, rates: Any) -> Any:
        norm = step(self, rates)
        if in_that_step():
            assert Place.micro_batch == die["micro_batch"], "there are fewer micro batches than that"
            kill()
        return norm

    def writing(file: str, folder: Path) -> bool:
        return during == "checkpoint" and file == die["file"] and folder.name == f"checkpoint-{die['step']}"

    def watched_save_engine(self: Any, folder: Path) -> None:
        def watched_save(value: Any, path: Any, *arguments: Any, **options: Any) -> None:
            if writing("weights", folder):
                whole = io.BytesIO()
                save(value, whole)
                Path(path).write_bytes(whole.getvalue())
                halve(Path(path))
            save(value, path, *arguments, **options)

        torch.save = watched_save
        try:
            save_engine(self, folder)
        finally:
            torch.save = save

    def watched_save_experience(self: Any, path: Path) -> None:
        save_experience(self, path)
        if writing("experience", path.parent):
            halve(path)

    def watched_write_state(ctx: Any, step: int, content: Any) -> None:
        write_state(ctx, step, content)
        if writing("state", ctx.checkpoints.path(step)):
            halve(ctx.checkpoints.path(step) / training_state.STATE)

    def watched_complete(self: Any, step: int) -> None:
        if writing("list", self.path(step)):
            complete(self, step)
            (self.path(step) / COMPLETE).rename(self.path(step) / f"{COMPLETE}.tmp")
            halve(self.path(step) / f"{COMPLETE}.tmp")
        complete(self, step)

    TransformersSampler.sample = watched_sample  # type: ignore[method-assign]
    sampling.DrawByUniforms.__call__ = watched_draw  # type: ignore[method-assign]
    on_policy.Aligner.collect = watched_collect  # type: ignore[method-assign]
    Learner.optimize = watched_optimize  # type: ignore[method-assign]
    Engine.backward = watched_backward  # type: ignore[method-assign]
    Engine.step = watched_step  # type: ignore[method-assign]
    Engine.save = watched_save_engine  # type: ignore[method-assign]
    Experience.save = watched_save_experience  # type: ignore[method-assign]
    training_state.write_state = watched_write_state
    Checkpoints.complete = watched_complete  # type: ignore[method-assign]
