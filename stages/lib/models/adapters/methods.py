"""The table of methods: how each is put on a model, what of it is trained, whether it can be merged, how large it is.

Imports no torch at its top: `plan` asks the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.counting import (
    Counted,
    count_adalora,
    count_bitfit,
    count_bottleneck,
    count_continued,
    count_freeze,
    count_ia3,
    count_lora,
    count_p_tuning,
    count_prefix_tuning,
    count_prompt_tuning,
    count_vera,
)
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
    method_name,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Method:
    """How one method works. Either peft has it, or what is trained are some of the model's own weights."""

    count: Callable[[Any, Mapping[str, Any]], Counted | None]
    """Of its params and a causal model's architecture: how much it trains; None where that is not known beforehand."""
    peft_type: str | None = None
    """What peft calls it; None: peft does not have it."""
    peft_config: Callable[[Any, str | None, list[str]], Any] | None = None
    """Of its params, of peft's name of the task, and of the new modules that are trained whole: peft's config of it."""
    choose: Callable[[Any, nn.Module], Iterable[str]] | None = None
    """Of its params and the model: the names of the parameters that are trained, where peft does not have it."""
    extend: Callable[[Any, nn.Module], None] | None = None
    """Of its params and the model: puts modules into it, of which `choose` then names the parameters."""
    can_be_merged: bool = True
    """Whether there are weights of the model that it can be added to."""
    goes_on: bool = True
    """Whether what it published is trained further by `method: continued`."""
    rate_factor: Callable[[Any, str], float] = lambda params, name: 1.0
    """Of its params and a parameter's name: what the learning rate of this is a multiple of the stage's."""


def lora_config(params: LoraMethod, task: str | None, new: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules="all-linear" if params.target_modules is None else params.target_modules,
        target_parameters=params.target_parameters,
        rank_pattern=dict(params.rank_pattern or {}),
        alpha_pattern=dict(params.alpha_pattern or {}),
        modules_to_save=[*new, *(params.modules_to_save or ())] or None,
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        # Of peft's own pissa the frozen weights are others than those on disk: what stands in principal.py leaves them.
        init_lora_weights=True if params.init in ("default", "pissa") else params.init,
        task_type=task,
    )


def lora_rate_factor(params: LoraMethod | ContinuedMethod, name: str) -> float:
    return params.learning_rate_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0


def adalora_config(params: AdaLoraMethod, task: str | None, new: list[str]) -> Any:
    """Of a training whose length is not known yet: `RankBudget` says it."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=params.rank,
        target_r=params.target_rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules="all-linear" if params.target_modules is None else params.target_modules,
        deltaT=params.allocate_every_steps,
        beta1=params.sensitivity_decay,
        beta2=params.uncertainty_decay,
        orth_reg_weight=0.0,  # which peft adds to losses of its own models alone: `RankBudget` has it
        total_step=1,
        modules_to_save=new or None,
        task_type=task,
    )


def vera_config(params: VeraMethod, task: str | None, new: list[str]) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=params.rank,
        vera_dropout=params.dropout,
        target_modules=params.target_modules or "all-linear",
        d_initial=params.initial_d,
        projection_prng_key=params.projection_seed,
        save_projection=True,
        modules_to_save=new or None,
        task_type=task,
    )


def ia3_config(params: Ia3Method, task: str | None, new: list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(
        target_modules=params.target_modules,
        feedforward_modules=params.feedforward_modules,
        modules_to_save=new or None,
        task_type=task,
    )


def prompt_tuning_config(params: PromptTuningMethod, task: str | None, new: list[str]) -> Any:
    from peft import PromptTuningConfig, PromptTuningInit

    begin = {"random": PromptTuningInit.RANDOM, "vocabulary": PromptTuningInit.SAMPLE_VOCAB}
    return PromptTuningConfig(
        num_virtual_tokens=params.num_virtual_tokens, prompt_tuning_init=begin[params.init], task_type=task
    )


def prefix_tuning_config(params: PrefixTuningMethod, task: str | None, new: list[str]) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=params.num_virtual_tokens,
        prefix_projection=params.projection,
        encoder_hidden_size=params.projection_size,
        task_type=task,
    )


def p_tuning_config(params: PTuningMethod, task: str | None, new: list[str]) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        num_virtual_tokens=params.num_virtual_tokens,
        encoder_reparameterization_type=params.encoder.upper(),
        encoder_hidden_size=params.encoder_size,
        encoder_num_layers=params.encoder_layers,
        encoder_dropout=0.0,
        task_type=task,
    )


def add_bottlenecks_to(params: BottleneckMethod, model: nn.Module) -> None:
    from stages.lib.models.adapters.bottlenecks import add_bottlenecks

    add_bottlenecks(params, model)


def choose_bottlenecks(params: BottleneckMethod, model: nn.Module) -> list[str]:
    from stages.lib.models.adapters.bottlenecks import names_of_bottlenecks

    return names_of_bottlenecks(params, model)


def choose_biases(params: BitFitMethod, model: nn.Module) -> list[str]:
    """The names of all biases, those of norms too."""
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def choose_parts(params: FreezeMethod, model: nn.Module) -> list[str]:
    """The names of the parameters in the last layers, or in the modules that are named, or in both at once; or in new layers."""
    layers = last_layers(model, params.last_layers) if params.last_layers is not None else None
    if params.only_new:
        names = layers_of(model)
        layers = [names[place] for place in getattr(model.config, ADDED_LAYERS, None) or ()]
    return [
        name
        for name, _ in model.named_parameters()
        if (layers is None or name.startswith(tuple(f"{layer}." for layer in layers)))
        and (params.modules is None or any(f".{module}." in f".{name}" for module in params.modules))
    ]


def last_layers(model: Any, count: int) -> list[str]:
    """The names of the model's last `count` layers; all of them where there are fewer."""
    return layers_of(model)[-count:]


def layers_of(model: Any) -> list[str]:
    """The names of the model's layers, found as the list of modules that is as long as its config says; [] if there is none."""
    from torch import nn

    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return [f"{name}.{number}" for number in range(len(module))]
    return []


METHODS: dict[type[AdapterBlock], Method] = {
    LoraMethod: Method(count_lora, "LORA", lora_config, rate_factor=lora_rate_factor),
    AdaLoraMethod: Method(count_adalora, "ADALORA", adalora_config, goes_on=False),
    VeraMethod: Method(count_vera, "VERA", vera_config),
    Ia3Method: Method(count_ia3, "IA3", ia3_config),
    BottleneckMethod: Method(
        count_bottleneck, choose=choose_bottlenecks, extend=add_bottlenecks_to, can_be_merged=False
    ),
    PromptTuningMethod: Method(
        count_prompt_tuning, "PROMPT_TUNING", prompt_tuning_config, can_be_merged=False, goes_on=False
    ),
    PrefixTuningMethod: Method(
        count_prefix_tuning, "PREFIX_TUNING", prefix_tuning_config, can_be_merged=False, goes_on=False
    ),
    PTuningMethod: Method(count_p_tuning, "P_TUNING", p_tuning_config, can_be_merged=False, goes_on=False),
    BitFitMethod: Method(count_bitfit, choose=choose_biases),
    FreezeMethod: Method(count_freeze, choose=choose_parts),
    ContinuedMethod: Method(count_continued, rate_factor=lora_rate_factor),
}
"""Params of a method -> how it works. A new method is its params and a row here."""


UNMERGEABLE = frozenset(
    name
    for params, method in METHODS.items()
    if not method.can_be_merged
    for name in (method_name(params), method.peft_type)
    if name is not None
)
"""What recipes and what peft call the methods that have no weights to merge."""


IN_PLACE = frozenset(method_name(params) for params, method in METHODS.items() if method.choose and not method.extend)
"""The methods that train weights which the model has, and add none."""


GOING_ON = frozenset(method_name(params) for params, method in METHODS.items() if method.goes_on)
"""The methods whose adapters are trained further."""


def count_ahead(adapter: AdapterBlock, architecture: Mapping[str, Any]) -> Counted | None:
    """How much of a causal model of this architecture is trained; None where that is not known before it is there."""
    return METHODS[type(adapter)].count(adapter, architecture)


def known_names(names: Sequence[str], most: int = 12) -> str:
    """Names as a sentence has them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
