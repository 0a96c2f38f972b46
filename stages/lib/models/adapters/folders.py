"""Where an adapter lies, and what is wrong with a folder that should hold one. Imports no torch: `plan` asks it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.settings.paths import holds_file, read_json
from stages.lib.models.adapters.methods import GOING_ON, IN_PLACE, METHODS, UNMERGEABLE
from stages.lib.models.adapters.params import ADAPTER_FOLDER, mergeable_methods, method_name, no_weights

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
OWN = "slipway_method"
"""What names the method in adapter_config.json where peft does not have it."""


def adapter_folder(folder: Path) -> Path:
    """Where the adapter lies: an artifact with a whole model keeps it in a folder of its own."""
    return folder if holds_file(folder, CONFIG) else folder / ADAPTER_FOLDER


def tokenizer_beside(folder: Path, base: Path) -> Path:
    """The folder whose tokenizer belongs to an adapter: its own, whose chat template may be what was taught, else its base's."""
    return next((home for home in (adapter_folder(folder), folder) if (home / "tokenizer.json").exists()), base)


def unreadable_adapter(folder: Path, where: str = "inputs.adapter") -> list[Problem]:
    """What is wrong if no adapter can be read from the folder."""
    home = adapter_folder(folder)
    if not holds_file(home, CONFIG):
        what = f"{folder} holds no adapter: there is no {CONFIG}"
        return [Problem(where, what, "Name an adapter, or a model that was trained with lora or an adapter.")]
    if holds_file(home, WEIGHTS):
        return []
    what = f"{home} holds no {WEIGHTS}" + (
        ", and adapter_model.bin may run code when it is opened" if holds_file(home, "adapter_model.bin") else ""
    )
    command = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(home)!r}).save_pretrained(FOLDER)"
    )
    return [Problem(where, what, f"Write it anew: `{command}`.")]


def adapter_config(folder: Path) -> Mapping[str, Any]:
    """What the file beside the weights says of them."""
    return read_json(adapter_folder(folder) / CONFIG)


def method_in(folder: Path) -> str:
    """The method of an adapter as recipes call it; as peft does where recipes do not know it."""
    config = adapter_config(folder)
    own = {str(method.peft_type): method_name(params) for params, method in METHODS.items() if method.peft_type}
    return str(config.get(OWN) or own.get(str(config.get("peft_type")), config.get("peft_type")))


def weights_trained_in(folder: Path) -> tuple[int, int]:
    """How many weights an adapter that can be read has to be trained further, and how many of them no base has."""
    from safetensors import safe_open

    home = adapter_folder(folder)
    with safe_open(home / WEIGHTS, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    trained = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(SHARED_BY_VERA))
    return trained, 0 if method_in(home) in IN_PLACE else trained


SHARED_BY_VERA = ("vera_A", "vera_B")
"""What the layers of a VeRA have in common, which is as it was drawn."""


def virtual_tokens_in(folder: Path) -> int:
    """How many tokens an adapter puts before each text."""
    return int(adapter_config(folder).get("num_virtual_tokens") or 0)


def no_continuing(folder: Path, where: str = "inputs.adapter") -> list[Problem]:
    """What is wrong if the adapter in a folder cannot be trained further."""
    if problems := unreadable_adapter(folder, where):
        return problems
    config, method = adapter_config(folder), method_in(folder)
    if method in UNMERGEABLE and not config.get(OWN):
        what = f"is of the method {method}, whose virtual tokens are kept without what they came out of"
        return [Problem(where, what, "Train a new one: leave the input out, and name a method.")]
    begins, bias = config.get("init_lora_weights", True), config.get("bias", "none")
    if method not in GOING_ON:
        return [Problem(where, f"is of the method {method}, which no stage trains further", GO_ON_MERGED)]
    if bias != "none" or not any(begins is way or begins == way for way in LEAVING):
        what = f"changes weights of its base as well (init_lora_weights: {begins}, bias: {bias})"
        return [Problem(where, what, GO_ON_MERGED)]
    return []


GO_ON_MERGED = "Merge it first, in a step `merge`, and train a new adapter on what that makes."


LEAVING = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways for a LoRA to begin that leave the weights under it as they are. The others of peft split them between the two."""


def tokenizer_to_train_with(inputs: Mapping[str, Path]) -> Path:
    """The folder of the tokenizer of the input `model`, or of the input `adapter` of it where there is one."""
    return tokenizer_beside(inputs["adapter"], inputs["model"]) if "adapter" in inputs else inputs["model"]


def nothing_to_merge(method: str, where: str = "inputs.adapter") -> Problem:
    """That an adapter of virtual tokens, or of modules, cannot become a part of a model's weights."""
    what = f"is of the method {method}, whose {no_weights(method)} that could be added to a model's"
    readers = "Read it where adapters are read as they are (evaluate, chat, peft)"
    hint = f"{readers}; or train one with weights: {mergeable_methods()}."
    return Problem(where, what, hint)


def unmergeable_adapter(folder: Path, where: str = "inputs.adapter") -> list[Problem]:
    """What is wrong if no adapter can be read from the folder, or none that has weights to merge."""
    if problems := unreadable_adapter(folder, where):
        return problems
    config = adapter_config(folder)
    method = str(config.get(OWN) or config.get("peft_type"))
    return [nothing_to_merge(method, where)] if method in UNMERGEABLE else []
