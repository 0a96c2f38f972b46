"""AdaLoRA (Zhang et al., 2023) in training: which of its triplets are worth their place, and what becomes of the others.

A layer makes W x + (alpha / r) B diag(e) A x, A (r, inputs), e (r), B (outputs, r), r the rank of the beginning. Of each number w
of A, e and B the sensitivity |w g|, g its gradient in the whole step after clipping, has a running mean I and the distance from
that a running mean U; I U is its score. A triplet (one e, a row of A, a column of B) scores the sum of that of e and the means
of those of its row and its column. After a step those that score least in all layers have their e set to zero, so many that as
many are left as the schedule says (`Phases`): all, then falling as a cubic from r to `target_rank` a layer, then these.
Scores and masks are peft's (`RankAllocator`); here they are fed with the gradients of any memory layout, and what they remember
are buffers of the model, and so in its checkpoints.

What is published is a plain LoRA of the triplets that are left, (alpha / r) B diag(e) beside A with a scale of 1: a layer of which
none is left has one whose B is zero, since peft has no rank of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.adalora import RankAllocator, SVDLinear
from torch import Tensor, nn

from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.params import LoraMethod
from stages.lib.models.adapters.principal import ADAPTER

PARTS = ("A", "E", "B")
IN_PEFT = "base_model.model."


class RememberingAllocator(RankAllocator):
    """peft's, whose running means are tensors that are written in place, and which is given the gradients of a step."""

    def __init__(self, model: nn.Module, config: Any, sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]):
        self.sensitivity, self.uncertainty = sensitivity, uncertainty
        self.gradients: dict[str, Tensor] = {}
        super().__init__(model, config, ADAPTER)

    def reset_ipt(self) -> None:
        self.exp_avg_ipt, self.exp_avg_unc = self.sensitivity, self.uncertainty
        for mean in (*self.sensitivity.values(), *self.uncertainty.values()):
            mean.zero_()

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        weights = dict(model.named_parameters())
        for name, gradient in self.gradients.items():
            now, mean, distance = (weights[name] * gradient).abs(), self.sensitivity[name], self.uncertainty[name]
            mean.copy_(self.beta1 * mean + (1 - self.beta1) * now)
            distance.copy_(self.beta2 * distance + (1 - self.beta2) * (now - mean).abs())


class RankBudget:
    """What goes along with the training of an AdaLoRA: its part of what is minimized, and the pruning after each step."""

    def __init__(self, adapted: Any, params: AdaLoraMethod, steps: int) -> None:
        """`adapted`: peft's model, whose weights are where and in the number format in which they are trained."""
        warmup, pruned, _ = params.phases(steps)
        self.tuner, self.weight = adapted.base_model, params.orthogonal_weight
        self.config = adapted.peft_config[ADAPTER]
        self.config.tinit, self.config.tfinal, self.config.total_step = warmup, steps - pruned, steps
        self.weights: dict[str, nn.Parameter] = {}
        means: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.kept: dict[str, Tensor] = {}
        for path, layer in svd_layers(self.tuner.model).items():
            for part in PARTS:
                name, weight = f"{path}.lora_{part}.{ADAPTER}", getattr(layer, f"lora_{part}")[ADAPTER]
                self.weights[name] = weight
                for of_all, what in zip(means, ("sensitivity", "uncertainty"), strict=True):
                    layer.register_buffer(f"{what}_{part}", torch.zeros_like(weight, dtype=torch.float32))
                    of_all[name] = layer.get_buffer(f"{what}_{part}")
            layer.register_buffer("kept", torch.ones(layer.r[ADAPTER], dtype=torch.bool, device=weight.device))
            self.kept[f"{path}.lora_E.{ADAPTER}"] = layer.get_buffer("kept")
        self.tuner.register_buffer("steps_followed", torch.zeros((), dtype=torch.int64))
        self.allocator = RememberingAllocator(self.tuner.model, self.config, *means)
        self.tuner.rankallocator = self.allocator

    @property
    def watched(self) -> Sequence[nn.Parameter]:
        """The weights whose gradients `follow` is given."""
        return list(self.weights.values())

    @property
    def zeroed(self) -> Sequence[nn.Parameter]:
        """The weights in which `follow` writes zeros."""
        return [self.weights[name] for name in self.kept]

    def penalty(self) -> Tensor:
        """What is added to a step's loss: a scalar in float32, as peft reckons it."""
        return self.weight * self.distance_from_orthogonal()

    def distance_from_orthogonal(self) -> Tensor:
        """The mean of |A A^T - 1| and |B^T B - 1| over all matrices."""
        norms = []
        for name, weight in self.weights.items():
            if name not in self.kept:
                rows = weight.float() if ".lora_A." in name else weight.float().T
                norms.append(torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
        return torch.stack(norms).mean()

    def follow(self, gradients: Sequence[Tensor]) -> None:
        """After a step of the optimizer with these gradients of `watched`: remembers them, and prunes where it is time to."""
        self.tuner.steps_followed += 1
        self.allocator.gradients = dict(zip(self.weights, gradients, strict=True))
        self.config.rank_pattern = {name: kept.tolist() for name, kept in self.kept.items()}
        self.tuner.update_and_allocate(int(self.tuner.steps_followed))
        self.allocator.gradients = {}
        for name, kept in self.config.rank_pattern.items():
            self.kept[name].copy_(torch.tensor(kept))

    def told(self) -> dict[str, float]:
        """What a line of the journal says of it: the mean rank of a layer, and how far its matrices are from orthogonal."""
        left = sum(int(kept.sum()) for kept in self.kept.values())
        with torch.no_grad():
            distance = float(self.distance_from_orthogonal())
        return {"mean_rank": left / len(self.kept), "distance_from_orthogonal": distance}


def as_pruned_lora(
    adapter: AdaLoraMethod, adapted: Any, trained: Mapping[str, Tensor]
) -> tuple[LoraMethod, dict[str, Tensor]]:
    """A LoRA that says what an AdaLoRA says whose trained weights are `trained`, and its weights on the CPU in float32."""
    scale = {name: each.scaling[ADAPTER] / (each.r[ADAPTER] + 1e-5) for name, each in svd_layers(adapted).items()}
    whole = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    ranks = {}
    for name, factor in scale.items():
        a, e, b = (trained[f"{name}.lora_{part}.{ADAPTER}"].float() for part in PARTS)
        left = (e != 0).view(-1)
        left[0] |= not bool(left.any())
        ranks[name.removeprefix(IN_PEFT)] = int(left.sum())
        whole[f"{name}.lora_A.{ADAPTER}.weight"] = a[left]
        whole[f"{name}.lora_B.{ADAPTER}.weight"] = b[:, left] * (e[left].T * factor)
    other = {path: rank for path, rank in ranks.items() if rank != adapter.target_rank}
    plain = LoraMethod(
        method="lora",
        publish=adapter.publish,
        rank=adapter.target_rank,
        alpha=float(adapter.target_rank),
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        rank_pattern=other or None,
        alpha_pattern={path: float(rank) for path, rank in other.items()} or None,
    )
    return plain, whole


def svd_layers(adapted: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in adapted.named_modules() if isinstance(module, SVDLinear)}
