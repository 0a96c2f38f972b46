"""Which linear layers quantization takes, and whether groups of their columns come out even. Imports no torch, for `plan`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem


def planned_columns(architecture: Mapping[str, Any], ignore: list[str]) -> dict[str, int]:
    """What decides the columns of a decoder's linear layers -> that number, for those layers that `ignore` leaves in.

    Of architectures with other names in their config nothing is known before the model is loaded.
    """
    hidden, heads = architecture.get("hidden_size"), architecture.get("num_attention_heads")
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    if hidden:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        found["hidden_size"] = (hidden, names)
    if hidden and heads:
        head_dim = architecture.get("head_dim") or hidden // heads
        found["num_attention_heads x head_dim"] = (heads * head_dim, ("self_attn.o_proj",))
    if intermediate := architecture.get("intermediate_size"):
        found["intermediate_size"] = (intermediate, ("mlp.down_proj",))
    layers = range(architecture.get("num_hidden_layers") or 1)
    return {
        dimension: columns
        for dimension, (columns, names) in found.items()
        if not all(is_ignored(f"model.layers.{layer}.{name}", ignore) for layer in layers for name in names)
    }


def is_ignored(name: str, ignore: list[str]) -> bool:
    """Whether a layer of this full name stays as it is: the rule that llm-compressor follows."""
    return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignore)


def group_problems(columns: Mapping[str, int], group_size: int) -> list[Problem]:
    """One problem for all dimensions or layers whose columns the group size does not divide."""
    wrong = {name: number for name, number in columns.items() if number % group_size}
    if not wrong:
        return []
    common = math.gcd(*columns.values())
    sizes = [size for size in range(8, common + 1) if common % size == 0]
    fitting = (
        f"Take one of {', '.join(map(str, sizes))}, or null." if sizes else "Take null: no size of 8 or more fits."
    )
    listed = [f"{name} ({number})" for name, number in wrong.items()]
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return [
        Problem(
            "params.group_size", f"{group_size} does not divide the columns of {', '.join(listed[:6])}{more}", fitting
        )
    ]
