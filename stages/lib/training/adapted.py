"""What becomes of a trained model: a whole one, or under an adapter that alone, or both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.stage import Context
from stages.lib.models.adapters.attaching import trained_state
from stages.lib.models.adapters.budget import as_pruned_lora
from stages.lib.models.adapters.budget_params import AdaLoraMethod
from stages.lib.models.adapters.merging import merged_in_place
from stages.lib.models.adapters.params import ADAPTER_FOLDER, AdapterBlock
from stages.lib.models.adapters.principal import as_plain_lora
from stages.lib.models.adapters.saving import write_adapter
from stages.lib.models.formats import Formats, say_if_other
from stages.lib.models.publishing import publish
from stages.lib.processes.collectives import from_main
from stages.lib.text.tokenizers import copy_left_out, copy_tokenizer
from stages.lib.training.continuing import block_of, with_adapter_to_train
from stages.lib.training.making import Made
from stages.lib.training.params import AdaptedParams


def publish_trained(
    ctx: Context,
    params: AdaptedParams,
    made: Made,
    make_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | Path,
    formats: Formats,
    stop_ids: list[int] | None,
    keep_frozen: bool = False,
) -> str:
    """Writes to `ctx.out` what was trained, and returns the number format of the weights. All processes call it.

    Under an adapter the weights of the base are those on disk, whatever the training's precision made of them: the main
    process calls `make_model` once more, and puts the adapter on that. A whole model has the adapter beside it in `adapter/`.
    The frozen weights in memory are given up before, unless `keep_frozen`: others may share them.
    """
    if params.adapter is None:
        state = made.engine.state_of(made.model)
        dtype = from_main(lambda: publish(made.model, state, tokenizer, ctx.out, formats=formats, stop_ids=stop_ids))
        say_if_other(ctx, formats, dtype)
        return dtype
    adapter: AdapterBlock = params.adapter
    trained = made.engine.state_of(made.model, trained_only=True)
    if ctx.world.is_main:
        if isinstance(adapter, AdaLoraMethod):
            adapter, trained = as_pruned_lora(adapter, made.model, trained)
        else:
            adapter, trained = as_plain_lora(adapter, made.model, trained)
    if not keep_frozen:
        drop_frozen(made.model)

    def write() -> str:
        # A ZeRO-3 run in this process would have the model split while it is built, which needs all processes.
        unset_hf_deepspeed_config()
        base = make_model()
        merges = not params.publishes_adapter
        zeros = {name for name, weight in base.named_parameters() if merges and not bool(weight.any())}
        adapted = with_trained(with_adapter_to_train(base, ctx, adapter), trained)
        folder = ctx.out if params.publishes_adapter else ctx.out / ADAPTER_FOLDER
        write_adapter(adapted, block_of(ctx, adapter), ctx, trained, folder)
        if params.publishes_adapter:
            write_tokenizer(tokenizer, ctx.out)
            return "fp32"
        merged = merged_in_place(adapted) if hasattr(adapted, "peft_config") else adapted
        options: dict[str, Any] = {"formats": formats, "stop_ids": stop_ids, "may_be_zero": zeros.__contains__}
        return publish(merged, merged.state_dict(), tokenizer, ctx.out, **options)

    dtype = from_main(write)
    if not params.publishes_adapter:
        say_if_other(ctx, formats, dtype)
    return dtype


def drop_frozen(model: Any) -> None:
    """Gives the memory of the frozen weights back, so that the base is not held twice while it is published.

    The model cannot be called any more. What ZeRO-3 has split is left to each process: it is a part of the base only.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and not hasattr(parameter, "ds_numel"):
            parameter.data = parameter.data.new_empty(0)


def with_trained(adapted: Any, trained: dict[str, torch.Tensor]) -> Any:
    """The model with the weights that were trained elsewhere, which must be all that would be trained in it."""
    own = trained_state(adapted)
    assert own.keys() == trained.keys(), sorted(own.keys() ^ trained.keys())[:3]
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trained[name])
    return adapted.eval()


def write_tokenizer(tokenizer: PreTrainedTokenizerBase | Path, out: Path) -> None:
    """The tokenizer beside an adapter: its chat template may be what was taught."""
    if isinstance(tokenizer, Path):
        copy_tokenizer(tokenizer, out)
    else:
        tokenizer.save_pretrained(out)
        copy_left_out(tokenizer, out)
