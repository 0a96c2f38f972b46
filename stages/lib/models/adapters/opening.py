"""Adapters on disk put on the model that they were trained on, taken off it again, and changed for one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from pydantic import TypeAdapter
from safetensors import safe_open
from transformers import PreTrainedModel

from pipeline.errors import ArtifactError, DataError, Problem, did_you_mean
from stages.lib.models.adapters.attaching import hide_virtual_tokens, unwarned
from stages.lib.models.adapters.bottlenecks import remove_bottlenecks
from stages.lib.models.adapters.folders import (
    LEAVING,
    WEIGHTS,
    adapter_config,
    adapter_folder,
    tokenizer_beside,
    unreadable_adapter,
)
from stages.lib.models.adapters.methods import METHODS
from stages.lib.models.adapters.params import AdapterBlock, AdapterParams, method_name
from stages.lib.models.adapters.saving import own_method, put_weights_in, require_base
from stages.lib.models.adapters.virtual import virtual_tokens_of
from stages.lib.models.loading import require_vocabulary
from stages.lib.text.tokenizers import load_tokenizer, stop_token_ids


class Adapted:
    """A causal model in memory once, and adapters of it by name, of which one at a time is on it, or none.

    `model` is what to call: the model itself, or peft's around it. It says nothing of places of virtual tokens. `tokenizers`
    have the adapter's own where one lies beside it, and of None the model's. While an adapter is on, generation stops at what
    its chat template ends a turn with, too, as that of the merged model does.
    """

    def __init__(
        self, base: PreTrainedModel, adapters: Mapping[str, Path], tokenizers: Mapping[str | None, Any] | None = None
    ) -> None:
        self.base = base
        self.adapters = dict(adapters)
        self.tokenizers = dict(tokenizers or {})
        self.stops = base.generation_config.eos_token_id if base.generation_config is not None else None
        self.model: Any = base
        self.active: str | None = None
        self.layers = dict(base.named_modules(remove_duplicate=False))
        self.replaced: dict[str, torch.Tensor] = {}
        """The base's own weights that the active adapter stands in for, or has peft change: put back when it is taken off."""

    def use(self, name: str | None) -> Any:
        """The model with the adapter of this name on it, or None: with none, which is the base bit for bit.

        Raises `DataError` where there is no such adapter, `ArtifactError` where it does not fit the model.
        """
        if name is not None and name not in self.adapters:
            problem = Problem("adapter", f"there is none called {name}", did_you_mean(name, list(self.adapters)))
            raise DataError(problem)
        if name != self.active:
            self.take_off()
            if name is not None:
                self.put_on(name)
        return self.model

    def put_on(self, name: str) -> None:
        adapter = self.adapters[name]
        self.replaced = {key: weight.detach().clone() for key, weight in changed_by(self.base, adapter).items()}
        self.active = name  # so that whatever is half done is undone
        try:
            self.model = attached(self.base, adapter, f"adapter {name}").eval()
        except BaseException:
            self.take_off()
            raise
        self.base.eval()
        if name in self.tokenizers and self.base.generation_config is not None:
            known = self.stops if isinstance(self.stops, list) else [] if self.stops is None else [self.stops]
            stops = dict.fromkeys([*stop_token_ids(self.tokenizers[name]), *known])
            self.base.generation_config.eos_token_id = list(stops) or None

    def take_off(self) -> None:
        # Not by peft's `unload`, which leaves modules in the model that were trained whole.
        for path, layer in self.layers.items():
            home, _, name = path.rpartition(".")
            if path and getattr(self.layers[home], name) is not layer:
                setattr(self.layers[home], name, layer)
        remove_bottlenecks(self.base)
        if hasattr(self.base, "peft_config"):
            del self.base.peft_config
        own = dict(self.base.named_parameters())
        with torch.no_grad():
            for key, weight in self.replaced.items():
                own[key].copy_(weight)
        if self.base.generation_config is not None:
            self.base.generation_config.eos_token_id = self.stops
        self.model, self.active, self.replaced = self.base, None, {}


def open_adapted(
    base: Path,
    adapters: Mapping[str, Path],
    load: Callable[[Path], PreTrainedModel],
    *,
    shown: str | None = None,
    say: Callable[[str], object] = lambda note: None,
) -> Adapted:
    """The model in `base`, as `load` reads it, and the adapters in these folders, with none of them on it.

    A folder may be that of a whole model which keeps its adapter beside it. `shown` is what the base is called where its
    folder is not that. `say` is told where an adapter does not say which weights it belongs to and names another model.
    Raises `ArtifactError` unless each can be read, was trained on this base and fits it.
    """
    problems = [
        problem for name, folder in adapters.items() for problem in unreadable_adapter(folder, f"adapter {name}")
    ]
    if problems:
        raise ArtifactError(*problems)
    homes = {name: adapter_folder(folder) for name, folder in adapters.items()}
    for name, home in homes.items():
        if said := require_base(home, base, shown or str(base), f"adapter {name}"):
            say(said)
    tokenizers = {name: load_tokenizer(tokenizer_beside(folder, base)) for name, folder in adapters.items()}
    adapted = Adapted(load(base), homes, {None: load_tokenizer(base), **tokenizers})
    for name in homes:
        require_vocabulary(adapted.base, tokenizers[name])
        adapted.use(name)
    adapted.use(None)
    return adapted


def changed_by(base: PreTrainedModel, adapter: Path) -> dict[str, torch.nn.Parameter]:
    """Name -> weight of the model, of those that do not stay as they are while the adapter is on it."""
    own = dict(base.named_parameters())
    if own_method(adapter) is not None:
        return {name: own[name] for name in names_in(adapter) if name in own}
    config = PeftConfig.from_pretrained(str(adapter))
    begins = getattr(config, "init_lora_weights", None)
    leaves = getattr(config, "bias", "none") == "none" and any(begins is known or begins == known for known in LEAVING)
    return {} if leaves else own


def attached(model: PreTrainedModel, adapter: Path, where: str = "inputs.adapter") -> Any:
    """The model under the adapter in a folder: peft's around it, or for a method of our own the model with its weights.

    Raises `ArtifactError` unless each of the adapter's weights finds its place, and none is lacking.
    """
    if own_method(adapter) is not None:
        return put_weights_in(extended(model, adapter, where), adapter, where)
    try:
        with unwarned():
            adapted: Any = PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        what = f"does not fit the model: {' '.join(str(error).split()):.300}"
        raise ArtifactError(Problem(where, what, OTHER_MODEL)) from error
    require_same_layers(adapted, adapter, where)
    if virtual := virtual_tokens_of(adapted):
        hide_virtual_tokens(adapted, virtual)
    return adapted


def extended(model: PreTrainedModel, adapter: Path, where: str) -> PreTrainedModel:
    """The model with the modules that an adapter of a method of our own adds to it, where it adds some.

    Raises `ArtifactError` unless these have all the weights that the adapter has, and no others.
    """
    name = own_method(adapter)
    method = next((method for params, method in METHODS.items() if method_name(params) == name), None)
    if method is None or method.extend is None or method.choose is None:
        return model
    block: AdapterBlock = TypeAdapter(AdapterParams).validate_python(adapter_config(adapter)["params"])
    try:
        method.extend(block, model)
    except DataError as error:
        what = f"does not fit the model: {' '.join(str(error).split()):.300}"
        raise ArtifactError(Problem(where, what, OTHER_MODEL)) from error
    if names := sorted(set(method.choose(block, model)) ^ names_in(adapter)):
        what = f"and the model do not have the same layers: {', '.join(names[:3])} stand on one side only"
        raise ArtifactError(Problem(where, what, OTHER_MODEL))
    for name, parameter in model.named_parameters():
        if name in names_in(adapter):
            parameter.data = parameter.data.to(model.device, model.dtype)
    return model


def require_same_layers(adapted: Any, adapter: Path, where: str, peft_name: str = "default") -> None:
    """Raises `ArtifactError` unless peft's model has a place for each of the adapter's weights, and lacks none."""
    kept = names_in(adapter)
    # peft saves whole embeddings beside an adapter, or does not, by what it adapts.
    ways = [
        set(get_peft_model_state_dict(adapted, adapter_name=peft_name, save_embedding_layers=whole))
        for whole in (False, True)
    ]
    if kept not in ways:
        names = sorted(min((kept ^ expected for expected in ways), key=len))
        what = f"and the model do not have the same layers: {', '.join(names[:3])} stand on one side only"
        raise ArtifactError(Problem(where, what, OTHER_MODEL))


def names_in(adapter: Path) -> set[str]:
    """The names of the adapter's weights, none of which is read."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        return set(file.keys())


OTHER_MODEL = "Name the model that it was trained on, as its adapter_config.json says."
