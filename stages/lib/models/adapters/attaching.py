"""Adapters put on models: which parameters are trained then, which are frozen, and what of a model is new and always trained."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import DataError, Problem, did_you_mean
from stages.lib.formulas.seeds import TORCH_BITS, bounded_seed
from stages.lib.models.adapters.four_bits import quantize_linears
from stages.lib.models.adapters.gathering import gathered
from stages.lib.models.adapters.methods import METHODS, Method, known_names
from stages.lib.models.adapters.params import AdapterBlock, FreezeMethod, LoraMethod, VirtualTokens, method_name
from stages.lib.models.adapters.principal import begin_principal

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How a class of transformers ends -> what peft calls its task. Of others peft knows no task."""


NEW_HEADS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
"""The tasks whose head is new: a model that only filled gaps or wrote on has none."""


def attach(model: Any, adapter: AdapterBlock, seed: int, task: str | None = None) -> Any:
    """The model frozen under a fresh adapter, which is the same in every process and every memory layout.

    What a method of peft makes is peft's model around `model`; of the others it is `model` itself. New heads are trained in
    any case. `task`: what peft calls the model's, where its class does not say it. Raises `DataError` where the method does
    not fit the model's layers.
    """
    torch.manual_seed(bounded_seed(seed, TORCH_BITS))
    method = METHODS[type(adapter)]
    new = new_modules(model)
    if method.choose is not None:
        return train_only(model, adapter, method, new)
    assert method.peft_config is not None
    for field in ("target_modules", "feedforward_modules"):
        require_linear(model, getattr(adapter, field, None), f"params.adapter.{field}")
    require_modules(model, getattr(adapter, "modules_to_save", None), "params.adapter.modules_to_save")
    require_parameters(model, getattr(adapter, "target_parameters", None), "params.adapter.target_parameters")
    if getattr(adapter, "quantize_base", None):
        whole = (*new, *(getattr(adapter, "modules_to_save", None) or ()))
        kept = [path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{each}") for each in whole)]
        quantize_linears(model, kept)
    names = linear_names(model)  # of which some bear another layer's name once peft has begun
    try:
        with unwarned():
            adapted = get_peft_model(model, method.peft_config(adapter, task or task_for_peft(model), new))
    except re.error as error:
        what = f"holds {error.pattern!s:.100}, which is no regular expression: {error.msg}"
        raise DataError(Problem("params.adapter", what, "Name the ends of paths, as v_proj or mlp.up_proj.")) from error
    except ValueError as error:
        said = str(error).splitlines()[0]
        what = f"{method_name(type(adapter))} does not fit this model: {said:.300}"
        hint = f"Name layers that do in target_modules: some of {known_names(not_refused(names, said))}; or take lora."
        raise DataError(Problem("params.adapter", what, hint)) from error
    if isinstance(adapter, VirtualTokens):
        hide_virtual_tokens(adapted, adapter.num_virtual_tokens)
    if isinstance(adapter, LoraMethod):
        for field in ("rank_pattern", "alpha_pattern"):
            require_deciding(adapted, getattr(adapter, field), f"params.adapter.{field}")
        if adapter.init == "pissa":
            begin_principal(adapted, adapter)
    return adapted


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Within it peft does not warn of what it does right."""
    with warnings.catch_warnings():
        # Conv1D keeps its weights the other way round, which peft sees by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # It says so of the patterns that it adds itself for experts, which do match; a recipe's own are looked at by us.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        # Of an adapter on one of two layers that share their weight: `merged_in_place` gives each its own.
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied after merging")
        yield


def task_of(model: Any) -> str | None:
    """What peft calls the model's task; None where it knows none for the class."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


def task_for_peft(model: Any) -> str | None:
    """The task that peft is told: not that of a head of several layers, which peft would train as one module and not merge."""
    several = [
        name for name, part in model.named_children() if name in ("classifier", "score") and list(part.children())
    ]
    return None if several and task_of(model) in NEW_HEADS else task_of(model)


def new_modules(model: Any) -> list[str]:
    """The names of the layers outside of the body of a model with a new head, and in a pooler, which is new as well."""
    if task_of(model) not in NEW_HEADS:
        return []
    body = model.base_model_prefix
    return [
        name
        for name, part in model.named_modules()
        if any(True for _ in part.parameters(recurse=False))
        and (not name.startswith(f"{body}.") or name.startswith(f"{body}.pooler."))
    ]


def train_only(model: Any, adapter: AdapterBlock, method: Method, new: Sequence[str]) -> Any:
    """The model with all frozen but its new modules and what the method chooses. Raises `DataError` where that is nothing."""
    assert method.choose is not None
    if method.extend is not None:
        method.extend(adapter, model)
    chosen = set(method.choose(adapter, model))
    if isinstance(adapter, FreezeMethod):
        require_modules(model, adapter.modules, "params.adapter.modules")
    only_new = isinstance(adapter, FreezeMethod) and adapter.only_new
    if only_new and not chosen and not new:
        what = f"is true, and nothing in this {type(model).__name__} is new"
        hint = "Name what a step `deepen` made of it as the model, or give last_layers or modules."
        raise DataError(Problem("params.adapter.only_new", what, hint))
    if not chosen and not only_new:
        name = method_name(type(adapter))
        what = f"finds nothing to train: {type(model).__name__} has no such parameters (method {name})"
        raise DataError(Problem("params.adapter", what, "Take lora, which fits every model with linear layers."))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name.startswith(tuple(f"{each}." for each in new)))
    return model


def hide_virtual_tokens(adapted: Any, count: int) -> None:
    """Has the model say nothing of the places of its virtual tokens: as many logits come out as tokens went in."""

    def cut(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> Any:
        read = named["input_ids"] if "input_ids" in named else args[0]
        if "logits" in output and output.logits.shape[1] == read.shape[1] + count:
            output.logits = output.logits[:, count:]
        return output

    adapted.register_forward_hook(cut, with_kwargs=True)


def trained_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_trained(model: nn.Module) -> int:
    """The number of parameters that are trained, whole also where ZeRO-3 has split them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained_state(model).values())


# Names of layers


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def linear_names(model: nn.Module) -> list[str]:
    """The last part of the paths of the model's linear layers, sorted."""
    return sorted({name.rpartition(".")[2] for name, each in model.named_modules() if is_linear(each)})


def not_refused(names: Sequence[str], message: str) -> list[str]:
    """The names that a message of peft's does not find fault with."""
    return [name for name in names if f"'{name}'" not in message]


def require_linear(model: nn.Module, names: Sequence[str] | str | None, where: str) -> None:
    """Raises `DataError` if one of the names is that of no linear layer; peft would pass over it while others are found."""
    if isinstance(names, str) or not names:
        return  # of a pattern peft says that it matches nothing
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    known = linear_names(model)
    problems = [
        Problem(where, f"the model has no linear layer '{name}'", did_you_mean(name, known))
        for name in names
        if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]
    if problems:
        raise DataError(*problems)


def require_modules(model: nn.Module, names: Sequence[str] | None, where: str) -> None:
    """Raises `DataError` if one of the names is that of no module with parameters of its own."""
    modules = {name for name, _ in model.named_parameters()}
    known = sorted({part for name in modules for part in name.split(".")[:-1] if not part.isdecimal()})
    problems = [
        Problem(where, f"the model has no module '{name}' with weights of its own", did_you_mean(name, known))
        for name in names or ()
        if not any(f".{name}." in f".{each}" for each in modules)
    ]
    if problems:
        raise DataError(*problems)


def require_parameters(model: nn.Module, names: Sequence[str] | None, where: str) -> None:
    """Raises `DataError` if one of the names is that of no matrix, or stack of matrices, outside of linear layers."""
    found = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not is_linear(module) and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) in (2, 3)
    ]
    known = sorted({".".join(path.split(".")[-2:]) for path in found})
    problems = [
        Problem(where, f"the model has no weight '{name}' that is no linear layer's", did_you_mean(name, known))
        for name in names or ()
        if not any(f".{path}".endswith(f".{name}") for path in found)
    ]
    if problems:
        raise DataError(*problems)


def require_deciding(adapted: nn.Module, patterns: Mapping[str, Any] | None, where: str) -> None:
    """Raises `DataError` if a pattern decides of no layer with an adapter; peft would pass over it."""
    layers = [
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        + (f".{module.parameter_name}" if isinstance(module, ParamWrapper) else "")
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    ]
    deciding = {get_pattern_key(list(patterns or ()), layer) for layer in layers}
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    problems = [
        Problem(where, f"'{name}' decides of no layer that gets an adapter", did_you_mean(name, known))
        for name in patterns or ()
        if name not in deciding
    ]
    if problems:
        raise DataError(*problems)


# Models on the same weights


def own_weights(model: nn.Module, adapter: AdapterBlock) -> list[str]:
    """The names of the model's own parameters that the adapter would train in place; none where it adds all that is trained."""
    choose = METHODS[type(adapter)].choose
    return list(choose(adapter, model)) if choose is not None else []


def sharing_weights(model: nn.Module, apart: Iterable[str] = ()) -> Any:
    """Another model of the same layers with the very same weights: what is trained in it must be added to it.

    `apart`: the names of the parameters of which it has copies of its own.
    """
    copied = set(apart)
    weights = dict(model.named_parameters())
    shared = {id(weight): weight for name, weight in weights.items() if name not in copied}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    with gathered([weights[name] for name in sorted(copied)]):
        return copy.deepcopy(model, shared)
