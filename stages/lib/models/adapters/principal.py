"""LoRAs that begin with the largest singular values of the weights that they stand beside (PiSSA: Meng et al., 2024).

With W = U S V^T, of which the first r columns are U_r, S_r, V_r, and s = alpha / r: B_0 = U_r sqrt(S_r / s) and
A_0 = sqrt(S_r / s) V_r^T, and a layer makes (W - s B_0 A_0) x + s B A x. The frozen W stays as it is on disk: what is taken off
it is reckoned beside it, from A_0 and B_0, which are buffers of the layer, and so are in its checkpoints: a decomposition
that is made again elsewhere has other vectors where singular values are close to each other.

What is published is s (B A - B_0 A_0) as a plain LoRA of rank 2 r, of the matrices [A; A_0] and [B, -B_0]: it is put on W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.errors import DataError, Problem
from stages.lib.models.adapters.gathering import gathered
from stages.lib.models.adapters.params import AdapterBlock, LoraMethod
from stages.lib.processes.collectives import from_main

START_A, START_B = "start_A", "start_B"
ADAPTER = "default"
"""What peft calls the adapter that is on a model."""


def begin_principal(adapted: nn.Module, params: LoraMethod) -> None:
    """Gives each pair of matrices its beginning. The main process decomposes; all processes call it.

    Raises `DataError` where a layer has no such decomposition, or fewer singular values than its rank.
    """
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    require_decomposable(layers)
    for layer in layers.values():
        begin_layer(layer, params.init_iterations)


def begin_layer(layer: Any, iterations: int | None) -> None:
    weight, rank, scaling = layer.get_base_layer().weight, layer.r[ADAPTER], layer.scaling[ADAPTER]
    pair = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with gathered([weight, *pair], writing=True), torch.no_grad():
        if weight.device.type != "meta":
            whole = weight.T if layer.fan_in_fan_out else weight
            starts = from_main(lambda: principal_parts(whole, rank, scaling, iterations))
            for parameter, start in zip(pair, starts, strict=True):
                parameter.copy_(start)
        layer.register_buffer(START_A, pair[0].detach().clone())
        layer.register_buffer(START_B, pair[1].detach().clone())
    layer.register_forward_hook(take_off_start)


def principal_parts(weight: Tensor, rank: int, scaling: float, iterations: int | None) -> tuple[Tensor, Tensor]:
    """A_0 (rank, inputs) and B_0 (outputs, rank) of a weight (outputs, inputs), on the CPU in float32."""
    if iterations is None:
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, right = torch.svd_lowrank(weight.float(), rank, niter=iterations)
        right = right.T
    root = (values / scaling).sqrt()
    return (root[:, None] * right).cpu(), (left * root).cpu()


def take_off_start(layer: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """What the layer makes, without what its matrices began with."""
    if layer.disable_adapters or layer.merged:
        return output
    inputs = arguments[0].to(layer.start_A.dtype)
    return output - (linear(linear(inputs, layer.start_A), layer.start_B) * layer.scaling[ADAPTER]).to(output.dtype)


def require_decomposable(layers: Mapping[str, LoraLayer]) -> None:
    problems = []
    for name, layer in layers.items():
        path = name.removeprefix("base_model.model.")
        if not isinstance(layer, LoraLinear):
            what = f"is pissa, and {path} is no linear layer"
            problems.append(Problem("params.adapter.init", what, "Name linear layers, or take init: default."))
            continue
        most = min(layer.in_features, layer.out_features)
        if layer.r[ADAPTER] > most:
            what = f"is {layer.r[ADAPTER]}, and the weight of {path} has {most} singular values to begin with"
            hint = f"Give the layer {most} or fewer in rank_pattern, or take init: default."
            problems.append(Problem("params.adapter.rank", what, hint))
    if problems:
        raise DataError(*problems)


def as_plain_lora(
    adapter: AdapterBlock, adapted: nn.Module, trained: Mapping[str, Tensor]
) -> tuple[AdapterBlock, dict[str, Tensor]]:
    """What is published of an adapter whose trained weights are `trained`: itself, or a LoRA on the weights as they were.

    The scale stays what it is: twice the rank has twice alpha, or with `use_rslora` alpha times the root of 2.
    """
    if isinstance(adapter, LoraMethod) and adapter.quantize_base is not None:
        return adapter.model_copy(update={"quantize_base": None}), dict(trained)
    if not isinstance(adapter, LoraMethod) or adapter.init != "pissa":
        return adapter, dict(trained)
    factor = math.sqrt(2) if adapter.use_rslora else 2.0
    plain = adapter.model_copy(
        update={
            "init": "default",
            "init_iterations": None,
            "rank": 2 * adapter.rank,
            "alpha": factor * adapter.alpha,
            "rank_pattern": {name: 2 * rank for name, rank in (adapter.rank_pattern or {}).items()} or None,
            "alpha_pattern": {name: factor * alpha for name, alpha in (adapter.alpha_pattern or {}).items()} or None,
        }
    )
    starts = {name: buffer.detach().to("cpu", torch.float32) for name, buffer in adapted.named_buffers()}
    whole = dict(trained)
    for name, tensor in trained.items():
        layer, _, last = name.partition(".lora_")
        if last == f"A.{ADAPTER}.weight":
            whole[name] = torch.cat([tensor.float(), starts[f"{layer}.{START_A}"]])
        elif last == f"B.{ADAPTER}.weight":
            whole[name] = torch.cat([tensor.float(), -starts[f"{layer}.{START_B}"]], dim=1)
    return plain, whole
