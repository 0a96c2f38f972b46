"""From the trained policy and critic to an artifact."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipeline.stage import Context
from stages.lib.models.adapters.params import ADAPTER_FOLDER
from stages.lib.models.adapters.saving import save_adapter
from stages.lib.models.formats import Formats
from stages.lib.models.heads import load_policy
from stages.lib.models.publishing import publish, zeros_of
from stages.lib.on_policy.actor_critic import SharedCritic
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Parts
from stages.lib.processes.collectives import from_main

VALUE_FOLDER = "value"
"""Where an artifact keeps the critic."""

FRESH_HEAD = "score.weight"


def publish_policy(ctx: Context, params: OnPolicyParams, parts: Parts, formats: Formats) -> str:
    """The policy as a whole model; under lora the adapter alone in `adapter/`, and merged into the weights it was trained on.

    Returns the number format of its weights.
    """
    start, engine = ctx.inputs["model"], parts.engine
    state = engine.state_of(parts.module.policy)
    options: dict[str, Any] = {"formats": formats, "may_be_zero": zeros_of(start)}
    if params.lora is None:
        return from_main(lambda: publish(parts.module.policy, state, start, ctx.out, **options))

    def write() -> str:
        save_adapter(parts.module.policy, state, ctx.origin("model"), ctx.out / ADAPTER_FOLDER)
        merged = PeftModel.from_pretrained(load_policy(start), str(ctx.out / ADAPTER_FOLDER)).merge_and_unload()
        return publish(merged, merged.state_dict(), start, ctx.out, **options)

    return from_main(write)


def publish_critic(ctx: Context, parts: Parts, formats: Formats) -> None:
    """The critic in `value/`: a model with one score, in the policy's formats, or under lora its adapter and its head."""
    value, engine = parts.module.value, parts.engine
    folder = ctx.out / VALUE_FOLDER
    if isinstance(value, SharedCritic):
        state, head = engine.state_of(value.base_model), engine.state_of(value.score)

        def write() -> None:
            save_adapter(value.base_model, state, ctx.origin("model"), folder)
            save_file(head, folder / "value_head.safetensors")

        from_main(write)
    elif isinstance(value, PreTrainedModel):
        state = engine.state_of(value)
        # A critic of its own begins with a head of zeros, and keeps it where no reward ever came.
        may_be_zero = zeros_of(ctx.inputs["value"]) if "value" in ctx.inputs else FRESH_HEAD.__eq__
        options: dict[str, Any] = {"formats": formats, "may_be_zero": may_be_zero}
        from_main(lambda: publish(value, state, ctx.inputs["model"], folder, **options))
