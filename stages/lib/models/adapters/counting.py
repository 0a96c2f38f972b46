"""How many parameters an adapter trains, from the config of its model alone. Imports no torch, for `plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.params import (
    ADDED_LAYERS,
    AdapterBlock,
    BitFitMethod,
    BottleneckMethod,
    ContinuedMethod,
    FreezeMethod,
    Ia3Method,
    LoraMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
    PTuningMethod,
    VeraMethod,
)
from stages.lib.models.arithmetic import completed, field_of, parameter_count
from stages.lib.models.linears import WITHOUT_TORCHS_LINEARS, Linear, layer_biases, layer_linears, other_biases
from stages.lib.models.memory import Quantized

Architecture = Mapping[str, Any]


class Counted(NamedTuple):
    """Numbers of parameters. A new head on the model, which is always trained, is in neither."""

    trained: int
    added: int
    """Those of the trained ones that the model did not have."""


def hidden_of(architecture: Architecture) -> int | None:
    return field_of(architecture, "hidden_size")


def layers_in(architecture: Architecture) -> int | None:
    return field_of(architecture, "num_hidden_layers")


def keys_in(architecture: Architecture) -> int | None:
    """The width of a layer's keys: fewer heads than of queries where these share them."""
    config = completed(architecture) or architecture
    hidden, heads = hidden_of(architecture), field_of(architecture, "num_attention_heads")
    if hidden is None or not heads:
        return None
    return (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads)


def ending_with(linears: list[Linear], names: list[str]) -> list[Linear]:
    """Those of the layers whose path ends with one of the names."""
    return [each for each in linears if any(f".{each.path}".endswith(f".{name}") for name in names)]


def count_lora(params: LoraMethod, architecture: Architecture) -> Counted | None:
    """Layers x sum of r (inputs + outputs) over the linear layers that get one; DoRA: one number more for each output."""
    linears, layers = targeted(params.target_modules, architecture), layers_in(architecture)
    if linears is None or not layers or params.modules_to_save or params.target_parameters:
        return None
    ranks = ranks_of(linears, params)
    if ranks is None:
        return None
    sizes = (
        rank * (each.inputs + each.outputs) + each.outputs * params.use_dora
        for each, rank in zip(linears, ranks, strict=True)
    )
    return added_only(layers * sum(sizes))


def targeted(names: list[str] | str | None, architecture: Architecture) -> list[Linear] | None:
    """The linear layers in a layer that these names choose, all of them for None; None where that is not known."""
    linears = layer_linears(architecture)
    if linears is None or names is None or isinstance(names, str):
        return linears if names is None else None
    if any(not ending_with(linears, [name]) for name in names):
        return None  # of layers that stand elsewhere
    return ending_with(linears, names)


def ranks_of(linears: list[Linear], params: LoraMethod) -> list[int] | None:
    """The rank of each of the layers; None where a pattern is no plain name of some of them, as one of a single layer."""
    patterns = params.rank_pattern or {}
    if any(not re.fullmatch(r"\w+(\.\w+)*", name) or not ending_with(linears, [name]) for name in patterns):
        return None
    named = ([rank for name, rank in patterns.items() if ending_with([each], [name])] for each in linears)
    return [found[0] if found else params.rank for found in named]


def count_adalora(params: AdaLoraMethod, architecture: Architecture) -> Counted | None:
    """Layers x sum of r (inputs + outputs + 1) over the linear layers that get one, with the r of the beginning."""
    linears, layers = targeted(params.target_modules, architecture), layers_in(architecture)
    if linears is None or not layers:
        return None
    return added_only(layers * sum(params.rank * (each.inputs + each.outputs + 1) for each in linears))


def count_vera(params: VeraMethod, architecture: Architecture) -> Counted | None:
    """Layers x sum of (outputs + r) over the linear layers that get one. The matrices they share are not trained."""
    linears, layers = targeted(params.target_modules, architecture), layers_in(architecture)
    if linears is None or not layers:
        return None
    return added_only(layers * sum(each.outputs + params.rank for each in linears))


def count_ia3(params: Ia3Method, architecture: Architecture) -> Counted | None:
    """Layers x (outputs of the layers that are scaled + inputs of those whose inputs are)."""
    linears, layers = layer_linears(architecture), layers_in(architecture)
    if linears is None or not layers:
        return None
    targets, inner = params.target_modules, params.feedforward_modules
    if targets is None or inner is None:
        usual = IA3_LAYERS.get(str(architecture.get("model_type")))
        if usual is None:
            return None
        targets, inner = list(usual), [usual[-1]]
    scaled_inputs = ending_with(linears, inner)
    scaled = [each for each in ending_with(linears, targets) if each not in scaled_inputs]
    return added_only(layers * (sum(each.outputs for each in scaled) + sum(each.inputs for each in scaled_inputs)))


IA3_LAYERS = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
}
"""The layers that peft scales by itself; of the last the inputs."""


def count_bottleneck(params: BottleneckMethod, architecture: Architecture) -> Counted | None:
    """Layers x the parts that get one, 2 where nothing else is said, x (2 hidden m + m + hidden)."""
    linears, layers, hidden = layer_linears(architecture), layers_in(architecture), hidden_of(architecture)
    if linears is None or not layers or not hidden:
        return None
    parts = {each.path.partition(".")[0] for each in linears}
    chosen = parts if params.modules is None else set(params.modules)
    if not chosen <= parts:
        return None
    return added_only(layers * len(chosen) * (2 * hidden * params.size + params.size + hidden))


def count_prompt_tuning(params: PromptTuningMethod, architecture: Architecture) -> Counted | None:
    """Virtual tokens x hidden."""
    hidden = hidden_of(architecture)
    return added_only(params.num_virtual_tokens * hidden) if hidden else None


def count_prefix_tuning(params: PrefixTuningMethod, architecture: Architecture) -> Counted | None:
    """Virtual tokens p, layers L, keys of a layer k, MLP m: p 2 L k; with projection p k + (k m + m) + (m 2 L k + 2 L k)."""
    keys, layers = keys_in(architecture), layers_in(architecture)
    if not keys or not layers:
        return None
    tokens, width = params.num_virtual_tokens, 2 * layers * keys
    if not params.projection:
        return added_only(tokens * width)
    inner = params.projection_size or keys
    return added_only(tokens * keys + (keys * inner + inner) + (inner * width + width))


def count_p_tuning(params: PTuningMethod, architecture: Architecture) -> Counted | None:
    """Virtual tokens p, hidden h, encoder m.

    MLP: p h + (h m + m) + (m m + m) + (m h + h). LSTM of n layers, both ways: p h + 2 (4 m (h + m) + 8 m) of the first
    layer, 2 (4 m (2 m + m) + 8 m) of each other, and the two above it, (4 m m + 2 m) + (2 m h + h).
    """
    hidden = hidden_of(architecture)
    if not hidden:
        return None
    inner, tokens = params.encoder_size or hidden, params.num_virtual_tokens * hidden
    if params.encoder == "mlp":
        mlp = (hidden * inner + inner) + (inner * inner + inner) + (inner * hidden + hidden)
        return added_only(tokens + mlp)
    first = 2 * (4 * inner * (hidden + inner) + 8 * inner)
    others = (params.encoder_layers - 1) * 2 * (4 * inner * 3 * inner + 8 * inner)
    above = (4 * inner * inner + 2 * inner) + (2 * inner * hidden + hidden)
    return added_only(tokens + first + others + above)


def count_bitfit(params: BitFitMethod, architecture: Architecture) -> Counted | None:
    """Layers x (outputs of its linear layers with a bias + hidden for each norm with one) + those outside of layers."""
    of_layer, elsewhere, layers = layer_biases(architecture), other_biases(architecture), layers_in(architecture)
    if of_layer is None or elsewhere is None or not layers:
        return None
    return Counted(layers * of_layer + elsewhere, 0)


def count_freeze(params: FreezeMethod, architecture: Architecture) -> Counted | None:
    """Last or new layers x the parameters of a layer; of named modules in them, the weights and biases of the linear layers there."""
    config, layers = completed(architecture), layers_in(architecture)
    if config is None or not layers or params.modules is not None:
        return None
    name = next(each for each in ("num_hidden_layers", "n_layer", "n_layers") if each in config)
    whole, less = parameter_count(config), parameter_count({**config, name: layers - 1}) if layers > 1 else None
    if whole is None or less is None:
        return None
    trained = len(config.get(ADDED_LAYERS) or ()) if params.only_new else min(params.last_layers or 0, layers)
    return Counted(trained * (whole - less), 0)


def count_continued(params: ContinuedMethod, architecture: Architecture) -> Counted | None:
    """None: it is what another step makes, and the architecture does not tell."""
    return None


def added_only(parameters: int) -> Counted:
    return Counted(parameters, parameters)


def count_published(adapter: AdapterBlock | None, trained: int | None) -> int | None:
    """How many weights the adapter has that is published, of which `trained` are trained; None where that is not known."""
    if isinstance(adapter, AdaLoraMethod):
        return None  # training tells which ranks are left
    # A PiSSA is published as a low-rank adapter of twice the rank: what it began with is taken off.
    doubled = isinstance(adapter, LoraMethod) and adapter.init == "pissa"
    return 2 * trained if doubled and trained is not None else trained


def count_quantized_ahead(adapter: AdapterBlock | None, architecture: Architecture) -> Quantized | None:
    """The weights that a base in four bits keeps so; None where it is not, or where that is not known."""
    linears, layers = layer_linears(architecture), layers_in(architecture)
    if getattr(adapter, "quantize_base", None) is None or linears is None or not layers:
        return None
    if architecture["model_type"] in WITHOUT_TORCHS_LINEARS:
        return None
    sizes = [each.inputs * each.outputs for each in linears]
    return Quantized(layers * sum(sizes), max(sizes))
