"""Policy, critic and reference without dropout, proven by calling them twice.

What the policy says of its completions when they are written is compared with what it says while it learns from them, and
both with what the reference says: a ratio of probabilities of which one dropped this and the other that would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.lib.models.drawing import evaluating, probe_ids, require_repeatable
from stages.lib.on_policy.actor_critic import Judged
from stages.lib.training.dropout import RowDropout
from stages.lib.training.engine import Engine


def switch_dropout_off(engine: Engine, vocabulary_size: int, reference: Callable[..., Judged] | None) -> None:
    """Leaves out whatever policy and critic in the engine would drop at random, in training too, and a reference that shares
    the policy's backbone, and thus its mode.

    Where the rates are set in modules they are 0 already; here follow the functions that classes call with rates of their own.
    All processes call it together. Raises `ArtifactError` if one of them still is random, in training or in evaluation.
    """
    ids_1T = probe_ids(vocabulary_size, engine.device)

    def judged_by(judge: Callable[..., Judged], times: int) -> Tensor:
        ids_BT = ids_1T.expand(times, -1)
        judged = judge(ids_BT, torch.ones_like(ids_BT), 1)
        return torch.cat([part.flatten().float() for part in (judged.logprobs, judged.values) if part is not None])

    judges = [engine.infer, *([reference] if reference is not None else [])]
    RowDropout().learn(engine.module, engine.device, lambda times: [judged_by(each, times) for each in judges])
    # With two rows: what is one number for a single row may be a number for each of several.
    require_repeatable(engine.device, lambda: judged_by(engine.infer, 2), in_training=True)
    with evaluating(engine.wrapped):
        require_repeatable(engine.device, lambda: judged_by(engine.infer, 2))
    if reference is not None:
        require_repeatable(engine.device, lambda: judged_by(reference, 2), where="inputs.reference")
