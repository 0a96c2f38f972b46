"""An adapter on the model that is trained: a fresh one, or the one of the input `adapter`, which is trained further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from pydantic import TypeAdapter
from safetensors.torch import load_file

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.stage import Context
from stages.lib.models.adapters.attaching import attach, trained_state, unwarned
from stages.lib.models.adapters.folders import WEIGHTS, adapter_config, adapter_folder, no_continuing
from stages.lib.models.adapters.gathering import gathered
from stages.lib.models.adapters.opening import OTHER_MODEL, require_same_layers
from stages.lib.models.adapters.params import AdapterBlock, AdapterParams, ContinuedMethod
from stages.lib.models.adapters.saving import own_method, put_weights_in, require_base

WHERE = "inputs.adapter"


def block_of(ctx: Context, adapter: AdapterBlock) -> AdapterBlock:
    """What is trained: of a continued adapter of a method that peft does not have, the block that it began with."""
    if not isinstance(adapter, ContinuedMethod):
        return adapter
    home = adapter_folder(ctx.inputs["adapter"])
    if own_method(home) is None:
        return adapter
    said: AdapterBlock = TypeAdapter(AdapterParams).validate_python(adapter_config(home)["params"])
    return said.model_copy(update={"publish": adapter.publish or "adapter"})


def with_adapter_to_train(model: Any, ctx: Context, adapter: AdapterBlock) -> Any:
    """The model frozen under a fresh adapter, or under that of the input `adapter` as it was published.

    Raises `DataError` or `ArtifactError` where it does not fit the model, or cannot be trained further.
    """
    if not isinstance(adapter, ContinuedMethod):
        return attach(model, adapter, ctx.seed)
    if problems := no_continuing(ctx.inputs["adapter"]):
        raise ArtifactError(*problems)
    home, block = adapter_folder(ctx.inputs["adapter"]), block_of(ctx, adapter)
    if block is not adapter or adapter_config(home).get("peft_type") != "LORA":
        for field, usual in (("dropout", 0.0), ("learning_rate_ratio", 1.0)):
            if getattr(adapter, field) != usual:
                raise DataError(
                    Problem(f"params.adapter.{field}", "is for a lora, which the adapter is not", "Remove it.")
                )
    if block is not adapter:
        adapted = attach(model, block, ctx.seed)
        with gathered(list(trained_state(adapted).values()), writing=True):
            put_weights_in(adapted, home)
        return adapted
    return under_saved(model, adapter, home)


def under_saved(model: Any, adapter: ContinuedMethod, home: Path) -> Any:
    """The model under an adapter of peft, which is trained and begins with the weights in its folder."""
    config = saved_config(home, adapter.dropout)
    try:
        with unwarned():
            adapted = get_peft_model(model, config)
        require_same_layers(adapted, home, WHERE)
        with gathered(list(trained_state(adapted).values()), writing=True):
            set_peft_model_state_dict(adapted, load_file(home / WEIGHTS))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        what = f"does not fit the model: {' '.join(str(error).split()):.300}"
        raise ArtifactError(Problem(WHERE, what, OTHER_MODEL)) from error
    return adapted


def saved_config(home: Path, dropout: float = 0.0) -> Any:
    """peft's config of the adapter in a folder, as one that is trained."""
    config: Any = PeftConfig.from_pretrained(str(home))
    config.inference_mode, config.base_model_name_or_path = False, None  # the folder of the base may be another one
    if config.peft_type == "LORA":
        config.lora_dropout, config.init_lora_weights = dropout, True
    if config.peft_type == "VERA":
        config.vera_dropout = dropout
    return config


def require_base_of_adapter(ctx: Context) -> None:
    """Raises `ArtifactError` where the input `adapter` says that it belongs to other weights than those of the base."""
    role = next(role for role, path in ctx.inputs.items() if path == ctx.base)
    if said := require_base(adapter_folder(ctx.inputs["adapter"]), ctx.inputs[role], ctx.origin(role)[0]):
        ctx.journal.note(said)
