"""Moments of `sample_preferences` at which a process kills itself with SIGKILL or is asked to stop, seen from outside.

`Job.die` with {"chunk": c, "token": t, "rank": r}: while process r draws the t-th token in its c-th chunk of prompts. `Job.stop`
is {"chunk": c}: once the last process has written c chunks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from stages.lib.generating.sampling import DrawByUniforms
from stages.lib.on_policy.candidates import CandidateWriter

UNWATCHED = (CandidateWriter.complete, DrawByUniforms.__call__)


class Chunks:
    """Those that this process has begun."""

    begun = 0


def stop_is_due(stop: Mapping[str, Any]) -> bool:
    return Chunks.begun >= int(stop["chunk"])


def watch(die: Mapping[str, Any], is_it: bool) -> None:
    """Lets this process, if it is the one, die where `die` says; counts in any case."""
    complete, draw = UNWATCHED
    Chunks.begun = 0

    def watched_complete(self: Any, *arguments: Any) -> Any:
        Chunks.begun += 1
        return complete(self, *arguments)

    def watched_draw(self: Any, input_ids: Any, scores: Any) -> Any:
        here = (Chunks.begun - 1, input_ids.shape[1] - self.prompt_length)
        if is_it and here == (die.get("chunk"), die.get("token")):
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, input_ids, scores)

    CandidateWriter.complete = watched_complete  # type: ignore[method-assign]
    DrawByUniforms.__call__ = watched_draw  # type: ignore[method-assign]
