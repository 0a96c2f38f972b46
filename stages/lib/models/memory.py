"""What a training takes in memory, from sizes alone. Imports no torch, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Quantized(NamedTuple):
    """Frozen weights that are kept in four bits: how many, and those of the largest layer among them."""

    weights: int
    largest: int

    def bytes_per_rank(self, width: int) -> int:
        """What they take in each process, in every layout, where a number of the training has `width` bytes.

        Half a byte each, and 4 bytes for a block of 64. A pass makes the weights of one layer anew: in float32, with 4 bytes
        for each pair of them, and once more as the training has them.
        """
        made_anew = self.largest * (4 + 2 + (width if width != BYTES["fp32"] else 0))
        return self.weights // 2 + self.weights // 16 + made_anew


def memory_bytes_per_rank(
    *,
    parameters: int,
    layout: Mapping[str, Any] | None,
    world_size: int,
    precision: str,
    micro_batch: int,
    sequence_length: int,
    hidden: int,
    layers: int,
    vocabulary: int,
    gradient_checkpointing: bool,
    dropped_heads: int = 0,
    trained: int | None = None,
    quantized: Quantized | None = None,
) -> int:
    """What one process needs at most on its device while it trains, in bytes; the libraries' own share is not in it.

    Weights, gradients and optimizer (Rajbhandari et al., 2020, ZeRO, section 3.1). Without DeepSpeed all are in float32: 4 +
    4 + 8 bytes a parameter, and a copy of the weights in `precision` under autocast. DeepSpeed: weights and gradients in
    `precision`, a float32 copy and Adam's two moments (12 bytes); stage 1 divides the last by the number of processes,
    stage 2 the gradients too, stage 3 the weights as well. What the layout moves to the host is not counted.

    Activations: 17 numbers of `hidden` per token and layer (Korthikanti et al., 2022, equation 2, with attention whose
    matrix is never whole), with gradient checkpointing 1 and one whole layer. With dropout in attention its matrix is whole, of
    `dropped_heads` heads: in float32, as a mask of 1 byte, and in `precision`. Logits: in `precision`, in float32, and their
    gradient.

    `trained`: how many of the parameters are trained, None for all. The others have weights only: neither gradients nor
    what the optimizer keeps, and no float32 copy of DeepSpeed. `quantized`: those of them that are kept in four bits.
    """
    width = BYTES[precision]
    kept = parameters - (quantized.weights if quantized else 0)
    states = state_bytes_per_rank(
        parameters=kept, layout=layout, world_size=world_size, precision=precision, trained=trained
    )
    if quantized:
        states += quantized.bytes_per_rank(width)
    tokens = micro_batch * sequence_length
    kept_layers = 1 + layers / 17 if gradient_checkpointing else layers
    activations = tokens * hidden * 17 * width * kept_layers
    matrices = tokens * sequence_length * dropped_heads * (4 + 1 + width) * (1 if gradient_checkpointing else layers)
    logits = tokens * vocabulary * (width + 4 + 4)
    return int(states + activations + matrices + logits)


def state_bytes_per_rank(
    *,
    parameters: int,
    layout: Mapping[str, Any] | None,
    world_size: int,
    precision: str,
    trained: int | None = None,
) -> int:
    """Of `memory_bytes_per_rank` the weights, gradients and optimizer."""
    learned = parameters if trained is None else trained
    width = BYTES[precision]
    zero = (layout or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0) if layout is not None else None
    if stage is None:
        return parameters * 4 + learned * (4 + 8) + (parameters * width if precision != "fp32" else 0)
    moved = {name for name in ("optimizer", "param") if zero.get(f"offload_{name}", {}).get("device", "none") != "none"}
    weights = 0 if "param" in moved else parameters * width / (world_size if stage == 3 else 1)
    gradients = learned * width / (world_size if stage >= 2 else 1)
    optimizer = 0 if "optimizer" in moved else learned * 12 / (world_size if stage >= 1 else 1)
    return int(weights + gradients + optimizer)
