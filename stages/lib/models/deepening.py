"""Causal models with more layers, which say what they said before: each new layer adds nothing yet (LLaMA Pro: Wu et al., 2024).

After each group of layers stands a copy of its last one whose two projections back to the hidden states are zero, so that
x + 0 + 0 = x. Trained alone (`freeze` with `only_new`), they learn what is new and leave what was known as it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import DataError, Problem
from stages.lib.models.adapters.methods import layers_of
from stages.lib.models.adapters.params import ADDED_LAYERS
from stages.lib.models.lengths import longest_text

BACK = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "wo", "fc2", "w2")
"""What transformers calls the projections of attention and MLP back to the hidden states: layers, or tensors of experts."""


OTHER_ARCHITECTURE = "Name a model of another architecture, as llama or gpt2."
MOST_COMPARED = 4096
"""Tokens of the text that both models read to be compared."""


def deepened(model: Any, num_new_layers: int) -> PreTrainedModel:
    """A model of the same weights with so many layers more, spread evenly. Its config lists them as `added_layers`.

    Raises `DataError` where the layers do not fall into so many groups, or the new ones would change what the model says.
    """
    names, params = layers_of(model), "params.num_new_layers"
    if not names:
        what = f"finds no list of layers in {type(model).__name__}"
        raise DataError(Problem("inputs.model", what, OTHER_ARCHITECTURE))
    if len(names) % num_new_layers:
        fitting = [number for number in range(1, len(names) + 1) if len(names) % number == 0]
        what = f"is {num_new_layers}, and the model's {len(names)} layers do not fall into so many groups of one size"
        raise DataError(Problem(params, what, f"Take one of {', '.join(map(str, fitting))}."))
    sources = order_of_layers(len(names), num_new_layers)
    added = [place for place in range(1, len(sources)) if sources[place] == sources[place - 1]]
    deeper = AutoModelForCausalLM.from_config(deeper_config(model.config, sources, added), dtype=torch.float32)
    home = names[0].rpartition(".")[0]
    try:
        deeper.load_state_dict(deeper_weights(model.state_dict(), home, sources, added))
    except RuntimeError as error:
        what = f"makes layers of other kinds of some of the model's: {' '.join(str(error).split()):.200}"
        raise DataError(Problem(params, what, OTHER_ARCHITECTURE)) from error
    deeper.generation_config = model.generation_config
    require_unchanged(model.eval(), deeper.eval())
    return deeper


def order_of_layers(layers: int, new: int) -> list[int]:
    """Of each layer of the deeper model: the layer that it is, or is a copy of. 4 layers and 2 new ones: 0 1 1 2 3 3."""
    group = layers // new
    return [each for number in range(layers) for each in [number] * (2 if (number + 1) % group == 0 else 1)]


def deeper_config(config: Any, sources: list[int], added: list[int]) -> Any:
    """The config with so many layers; what it says of each single layer is said of its copy as well."""
    deeper = copy.deepcopy(config)
    layers = config.num_hidden_layers
    fields = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers}
    deeper.num_hidden_layers = len(sources)
    for name, value in fields.items():
        if name != ADDED_LAYERS:
            setattr(deeper, name, [value[source] for source in sources])
    setattr(deeper, ADDED_LAYERS, added)
    return deeper


def deeper_weights(
    state: dict[str, torch.Tensor], home: str, sources: list[int], added: list[int]
) -> dict[str, torch.Tensor]:
    """Name -> weight of the deeper model. `home`: the name of the list of layers."""
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(f"{home}.")}
    for place, source in enumerate(sources):
        start = f"{home}.{source}."
        for name, tensor in state.items():
            if name.startswith(start):
                rest = name.removeprefix(start)
                is_back = any(part in BACK for part in rest.split("."))
                weights[f"{home}.{place}.{rest}"] = torch.zeros_like(tensor) if place in added and is_back else tensor
    return weights


def require_unchanged(model: Any, deeper: Any) -> None:
    """Raises `DataError` unless both say the same of a text, bit for bit; of one that is longer than a window, where there is one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = longest_text(config.to_dict()) or MOST_COMPARED
    length = min(max(16, window + 8), longest, MOST_COMPARED)
    ids = torch.arange(length).remainder(int(config.vocab_size))[None]
    with torch.no_grad():
        apart = (model(input_ids=ids).logits - deeper(input_ids=ids).logits).abs().max()
    if float(apart):
        what = f"are of a kind that changes what the model says, by up to {float(apart):.3g}, though they add nothing"
        raise DataError(Problem("params.num_new_layers", what, OTHER_ARCHITECTURE))
