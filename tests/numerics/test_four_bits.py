"""NF4 as the paper defines it, and a LoRA that learns beside a base that is kept so."""

from __future__ import annotations

import copy
from statistics import NormalDist

import torch
from torch import nn

from stages.lib.models.adapters.attaching import attach, trained_state
from stages.lib.models.adapters.four_bits import (
    NF4Linear,
    count_quantized,
    dequantized_nf4,
    nf4_levels,
    quantized_nf4,
)
from tests.numerics.test_adapter_counts import ARCHITECTURES, block_of
from tests.numerics.test_principal import descend, model_of


def test_levels_are_quantiles_of_a_normal_distribution() -> None:
    """Eight above zero and seven below, evenly spaced in probability from 1 - (1/32 + 1/30) / 2 to 1/2, over the largest."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(last + (0.5 - last) * step / 8) for step in range(8)]
    below = [-quantile(last + (0.5 - last) * step / 7) for step in range(7)]
    expected = [each / max(above) for each in sorted([*below, 0.0, *above])]
    assert torch.allclose(nf4_levels(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_levels_are_those_of_the_paper() -> None:
    """Appendix E, to the digits that float32 has."""
    printed = (
        "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
        "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
        "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
    )
    assert torch.allclose(nf4_levels(), torch.tensor([float(each) for each in printed.split()]), rtol=0, atol=1e-6)


def test_blocks() -> None:
    """Levels times the largest of a block come back exactly; others to the nearest: at most half the widest gap away.

    150 numbers are three blocks, of 64, 64 and 22: 96 bytes and 3 magnitudes.
    """
    levels = nf4_levels()
    exact = torch.stack([levels[torch.arange(64) % 16] * largest for largest in (0.5, 3.0)])
    codes, magnitudes = quantized_nf4(exact)
    assert torch.equal(magnitudes, torch.tensor([0.5, 3.0]))
    assert torch.equal(dequantized_nf4(codes, magnitudes, exact.shape), exact)
    torch.manual_seed(0)
    weight = torch.randn(10, 15)
    codes, magnitudes = quantized_nf4(weight)
    assert (codes.numel(), magnitudes.numel()) == (96, 3)
    found = dequantized_nf4(codes, magnitudes, weight.shape).flatten()
    choices = levels * magnitudes.repeat_interleave(64)[:150, None]
    nearest = (choices - weight.flatten()[:, None]).abs().amin(dim=1)
    assert torch.allclose((found - weight.flatten()).abs(), nearest, rtol=0, atol=1e-6)
    zeros = torch.zeros(64)
    assert torch.equal(dequantized_nf4(*quantized_nf4(zeros), zeros.shape), zeros)


def test_a_layer_makes_its_weight_anew() -> None:
    """Forward and backward are those of the weight that it stands for, which neither keeps: 0.5 + 4 / 64 bytes a weight."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    layer = NF4Linear(plain)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 64 * 48 * (0.5 + 4 / 64)
    inputs, other = (torch.ones(3, 64).cumsum(1).requires_grad_() for _ in range(2))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda each: each
    ):
        made = layer(inputs)
    assert torch.Size((48, 64)) not in kept
    expected = nn.functional.linear(other, layer.weight, plain.bias)
    assert torch.allclose(made, expected, rtol=0, atol=1e-5)
    made.square().sum().backward()
    expected.square().sum().backward()
    assert inputs.grad is not None and other.grad is not None
    assert torch.allclose(inputs.grad, other.grad, rtol=1e-5, atol=1e-3)
    assert not float((layer.weight - plain.weight).detach().abs().max()) > 0.16 * float(
        plain.weight.detach().abs().max()
    )
    assert layer.state_dict().keys() == {"bias"}


def test_what_is_trained_whole_is_kept_with_all_that_stands_in_it() -> None:
    model = model_of(ARCHITECTURES["llama"])
    adapted = attach(
        model,
        block_of({"method": "lora", "quantize_base": "nf4", "target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
        0,
    )
    saved = [name for name in trained_state(adapted) if ".modules_to_save." in name]
    assert len(saved) == 3 * model.config.num_hidden_layers
    assert not any(isinstance(part, NF4Linear) for name, part in adapted.named_modules() if ".mlp" in name)


def test_a_lora_learns_beside_it() -> None:
    """As beside a base whose weights were rounded to the same levels; the output layer and the embeddings are whole."""
    base = model_of(ARCHITECTURES["llama"])
    block = {"method": "lora", "rank": 4}
    ours = attach(copy.deepcopy(base), block_of({**block, "quantize_base": "nf4"}), seed=1)
    rounded = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.weight.copy_(dequantized_nf4(*quantized_nf4(layer.weight), layer.weight.shape))
    theirs = attach(rounded, block_of(block), seed=1)
    losses = descend(ours, 4)
    assert losses[-1] < losses[0]
    assert all(abs(one - other) < 1e-5 for one, other in zip(losses, descend(theirs, 4), strict=True))
    assert trained_state(ours).keys() == trained_state(theirs).keys()
    # A layer: q, o 32 x 32; k, v 32 x 16; three of 32 x 80.
    assert count_quantized(ours) == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)
    assert "base_model.model.lm_head.weight" in dict(ours.named_parameters())
