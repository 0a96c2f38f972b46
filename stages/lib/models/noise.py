"""What a model's config says of chance in training. Imports no torch, for `plan`; what it does not say is found by calling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from stages.lib.models.arithmetic import field_of
from stages.lib.models.config import text_config

ATTENTION_RATES = {
    "gpt2": {"attn_pdrop": 0.1},
    "bert": {"attention_probs_dropout_prob": 0.1},
    "roberta": {"attention_probs_dropout_prob": 0.1},
    "distilbert": {"attention_dropout": 0.1},
}
"""Families that drop from attention unless their config says otherwise."""


def dropped_heads(architecture: Mapping[str, Any]) -> int:
    """How many heads of each layer drop from attention in training: all or none, as far as the config says."""
    usual = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "attention_probs_dropout_prob": 0.0}
    rates = usual | ATTENTION_RATES.get(str(architecture.get("model_type")), {})
    drops = any(
        isinstance(rate := architecture.get(name, default), float) and rate > 0 for name, default in rates.items()
    )
    return int(field_of(architecture, "num_attention_heads") or 0) if drops else 0


NOISE = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Fields by which routers of experts multiply what they see with random numbers in training."""


def noise_of(architecture: Mapping[str, Any]) -> dict[str, float]:
    """The fields of `NOISE` that are not 0."""
    config = text_config(architecture)
    return {name: value for name in NOISE if isinstance(value := config.get(name), (int, float)) and value > 0}


def noise_notes(architecture: Mapping[str, Any]) -> tuple[str, ...]:
    """What to know before such a model is trained."""
    return tuple(
        f"{name} is {value}: what routers draw depends on micro_batch_size and the number of processes"
        for name, value in noise_of(architecture).items()
    )


def noise_problems(architecture: Mapping[str, Any], role: str = "model") -> list[Problem]:
    """What is wrong with a model whose probabilities are compared with others while it is trained: dropout can be left out,
    and the noise of routers cannot."""
    return [
        Problem(
            f"inputs.{role}",
            f"its config says {name}: {value}, so that in training it gives the same tokens other probabilities each time",
            f"Set {name} to 0 in its config.json.",
        )
        for name, value in noise_of(architecture).items()
    ]
