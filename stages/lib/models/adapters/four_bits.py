"""Frozen linear layers in four bits, for adapters to be trained beside (QLoRA: Dettmers et al., 2023).

A weight is cut into blocks of 64; a block is kept as its largest magnitude, in float32, and a number of the 16 levels of
NF4 for each of its weights over that: 4.5 bits a weight. The levels are quantiles of a normal distribution, scaled to [-1, 1],
one of them zero, so that normal weights use all of them as often (section 3 and appendix E of the paper). In plain torch: a layer
makes its weight anew in each pass forward and backward, and keeps it in neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from pipeline.errors import DataError, Problem
from stages.lib.models.adapters.gathering import gathered

BLOCK = 64
OFFSET = 1 - (1 / 32 + 1 / 30) / 2
"""The probability of the outermost quantiles: between those of 15 and of 16 even steps, as none is at 0 or 1."""


def nf4_levels() -> Tensor:
    """The 16 levels of NF4, ascending, in float32: 7 below zero, zero, 8 above it."""
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


def quantized_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two levels in each byte (numbers / 2), and the largest magnitude of each block of 64; the last block is filled with zeros."""
    flat = weight.detach().float().flatten()
    blocks = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    levels = nf4_levels().to(weight.device)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], largest


def dequantized_nf4(codes: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
    """The weight of this shape, in float32."""
    # A byte's two levels are looked up at once: as few numbers as can be lie beside the weight meanwhile.
    levels = nf4_levels().to(codes.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    blocks = embedding(codes.int(), pairs).view(-1, BLOCK).mul_(largest[:, None])
    return blocks.flatten()[: shape.numel()].view(shape)


class FrozenProduct(torch.autograd.Function):
    """x W^T with a weight that is made anew in each direction."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return linear(inputs, layer.weight.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class NF4Linear(nn.Linear):
    """A frozen linear layer in four bits. What it is kept as is in no checkpoint: it is made of the base's weights again."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shape = torch.Size((self.out_features, self.in_features))
        with gathered([layer.weight], writing=True):
            codes, largest = quantized_nf4(layer.weight)
        self.register_buffer("codes", codes, persistent=False)
        # As whole numbers, which no layout rounds to the training's precision.
        self.register_buffer("largest", largest.view(torch.int32), persistent=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return dequantized_nf4(self.codes, self.largest.view(torch.float32), self.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = FrozenProduct.apply(inputs, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def quantize_linears(model: Any, kept: list[str]) -> int:
    """Puts the model's linear layers in four bits, but for the output layer and what stands in or under `kept`, and returns how many these are.

    Raises `DataError` where there are none.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear
        and layer is not output
        and not f"{path}.".startswith(tuple(f"{each}." for each in kept))
    ]
    if not found:
        what = f"is nf4, and {type(model).__name__} has no linear layers of torch"
        raise DataError(Problem("params.adapter.quantize_base", what, "Remove it: the base is then kept as it is."))
    for path, layer in found:
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, NF4Linear(layer))
    return len(found)


def count_quantized(model: nn.Module) -> int:
    """The number of weights that are kept in four bits, and so are no parameters."""
    return sum(layer.shape.numel() for layer in model.modules() if isinstance(layer, NF4Linear))
