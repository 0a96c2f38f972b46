"""Small networks beside the parts of frozen layers (Houlsby et al., 2019; in parallel: He et al., 2022). peft does not have them.

With the input x and the output y of a layer's attention or MLP, before the layer adds it to what goes around it:
serial y + c f(y), parallel y + c f(x), where f(z) = U g(D z + d) + u, D (m, h), U (h, m), and U and u begin with zeros. They
stand in the model as modules `bottleneck` in the parts that they change, and are saved under the names that they have there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import DataError, Problem, did_you_mean
from stages.lib.models.adapters.gathering import gathered
from stages.lib.models.adapters.params import BottleneckMethod

NAME = "bottleneck"
PARTS = (("self_attn", "attn", "attention", "self_attention"), ("mlp", "feed_forward", "ffn", "block_sparse_moe"))
"""What transformers calls the attention and the MLP in a layer."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """f(z) times its scale, of z (..., hidden)."""

    def __init__(self, hidden: int, params: BottleneckMethod) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, params.size)
        self.activation = ACTIVATIONS[params.activation]()
        self.up = nn.Linear(params.size, hidden)
        self.scale = params.scale
        self.parallel = params.placement == "parallel"
        self.handle: RemovableHandle | None = None
        with gathered([self.up.weight, self.up.bias], writing=True), torch.no_grad():
            self.up.weight.zero_()
            self.up.bias.zero_()

    def forward(self, states: Tensor) -> Tensor:
        changed: Tensor = self.up(self.activation(self.down(states)))
        return changed * self.scale


def add_bottlenecks(params: BottleneckMethod, model: Any) -> None:
    """Puts one into each part of the layers that is to get one. Raises `DataError` where the model has no such parts."""
    from stages.lib.models.adapters.methods import layers_of

    layers = [model.get_submodule(name) for name in layers_of(model)]
    weight = next(model.parameters())
    hidden = int(model.config.get_text_config().hidden_size)
    for names in [parts_to_change(params, layer) for layer in layers] or [no_parts(model)]:
        for part in names:
            bottleneck = Bottleneck(hidden, params).to(weight.device)
            part.add_module(NAME, bottleneck)
            bottleneck.handle = part.register_forward_hook(change_output, with_kwargs=True)


def parts_to_change(params: BottleneckMethod, layer: nn.Module) -> list[nn.Module]:
    """The parts of a layer that get one. Raises `DataError` for names that it does not have."""
    known = {name: part for name, part in layer.named_children() if any(True for _ in part.parameters())}
    if params.modules is None:
        found = [next((known[name] for name in names if name in known), None) for names in PARTS]
        missing = [each for each, part in zip(("attention", "MLP"), found, strict=True) if part is None]
        if missing:
            what = f"is null, and no {' or '.join(missing)} is known among the parts of a layer: {', '.join(known)}"
            raise DataError(Problem("params.adapter.modules", what, "Name those whose outputs are to be changed."))
        return [part for part in found if part is not None]
    problems = [
        Problem("params.adapter.modules", f"a layer has no part '{name}'", did_you_mean(name, list(known)))
        for name in params.modules
        if name not in known
    ]
    if problems:
        raise DataError(*problems)
    return [known[name] for name in dict.fromkeys(params.modules)]


def no_parts(model: Any) -> list[nn.Module]:
    what = f"finds no list of layers in {type(model).__name__}"
    raise DataError(Problem("params.adapter", f"bottleneck {what}", "Take lora, which fits models with linear layers."))


def change_output(part: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """What a part of a layer makes, with what its bottleneck adds to that. A part may make several things: the first."""
    bottleneck = part.bottleneck
    made = output[0] if isinstance(output, tuple) else output
    read = made if not bottleneck.parallel else named["hidden_states"] if "hidden_states" in named else arguments[0]
    changed = made + bottleneck(read).to(made.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def names_of_bottlenecks(params: BottleneckMethod, model: nn.Module) -> list[str]:
    homes = tuple(f"{path}." for path, part in model.named_modules() if isinstance(part, Bottleneck))
    return [name for name, _ in model.named_parameters() if homes and name.startswith(homes)]


def remove_bottlenecks(model: nn.Module) -> None:
    """The model without any: what it was before one was added."""
    for part in list(model.modules()):
        bottleneck = dict(part.named_children()).get(NAME)
        if isinstance(bottleneck, Bottleneck):
            if bottleneck.handle is not None:
                bottleneck.handle.remove()
            delattr(part, NAME)
