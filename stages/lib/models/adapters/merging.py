"""Adapters that become a part of their model's weights: one merged, or several of one model added to it at once.

A mixture (task arithmetic: Ilharco et al., 2023) is

    W + sum over adapters of w (W_adapter - W)

W_adapter is W with that adapter alone merged, so that adapters of any method that has weights to merge can be mixed with one
another. One adapter with the weight 1 is what merging makes of it, but for rounding; 0.5 is half way; a negative weight unlearns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from stages.lib.models.adapters.attaching import unwarned


def merged_in_place(adapted: Any) -> PreTrainedModel:
    """The model under peft's `adapted`, with what the adapter adds in its weights: it computes what the two computed.

    In place: a copy of each weight that is merged would make the model the second in memory. Where the adapter is on one of two
    layers that share their weight, the output layer and the embeddings, each gets its own.
    """
    model = adapted.get_base_model()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    adds = [each for each in (head, embeddings) if isinstance(each, BaseTunerLayer)]
    if adds and head is not None and head.weight is embeddings.weight:
        bare = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        bare.weight = nn.Parameter(bare.weight.detach().clone(), requires_grad=False)
    with unwarned():
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def mix_adapters(
    load: Callable[[], PreTrainedModel],
    merged: Callable[[PreTrainedModel, Path, str], PreTrainedModel],
    adapters: Mapping[str, tuple[Path, float]],
) -> PreTrainedModel:
    """A model that `load` gives, with all adapters (name -> folder and weight) added, each merged by `merged` into a model of its own.

    Differences are summed in float64, in the order of the names.
    """
    base = load()
    before = dict(base.named_parameters(remove_duplicate=False))
    moves: dict[str, torch.Tensor] = {}
    for name, (folder, weight) in sorted(adapters.items()):
        one = merged(load(), folder, f"inputs.adapters.{name}")
        for key, tensor in one.named_parameters(remove_duplicate=False):
            if not torch.equal(tensor, before[key]):
                move = (tensor.detach().double() - before[key].detach().double()) * weight
                moves[key] = moves[key] + move if key in moves else move
    sharing: dict[int, list[str]] = {}
    for key, weight in before.items():
        sharing.setdefault(id(weight), []).append(key)
    apart = {
        key
        for keys in sharing.values()
        if not all(same_move(moves.get(keys[0]), moves.get(key)) for key in keys[1:])
        for key in keys
    }
    with torch.no_grad():
        for key, move in moves.items():
            whole = (before[key].double() + move).to(before[key].dtype)
            if key in apart:
                home, _, own = key.rpartition(".")
                setattr(base.get_submodule(home), own, nn.Parameter(whole, requires_grad=False))
            else:
                before[key].data = whole
    return base


def same_move(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two layers that share their weight may go on to."""
    return one is other if one is None or other is None else torch.equal(one, other)
