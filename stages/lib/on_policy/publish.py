"""From the trained policy and critic to an artifact."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipeline.stage import Context
from stages.lib.models.adapters.attaching import count_trained
from stages.lib.models.adapters.folders import tokenizer_to_train_with
from stages.lib.models.adapters.params import AdapterBlock
from stages.lib.models.adapters.saving import write_adapter
from stages.lib.models.formats import Formats, say_if_other
from stages.lib.models.heads import load_policy
from stages.lib.models.publishing import publish, zeros_of
from stages.lib.on_policy.actor_critic import SharedCritic
from stages.lib.on_policy.adapting import critic_body
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Parts
from stages.lib.processes.collectives import from_main
from stages.lib.training.adapted import publish_trained, with_trained
from stages.lib.training.continuing import block_of
from stages.lib.training.making import Made

VALUE_FOLDER = "value"
"""Where an artifact keeps the critic."""

VALUE_HEAD = "value_head.safetensors"
"""The critic's head, where its layers are those of the policy's base under an adapter."""

FRESH_HEAD = "score.weight"


def publish_policy(ctx: Context, params: OnPolicyParams, parts: Parts, formats: Formats) -> str:
    """The policy as a whole model, or under an adapter as stages on fixed data publish it: merged, the adapter alone, or both.

    Returns the number format of its weights.
    """
    start, policy = ctx.inputs["model"], parts.module.policy
    if params.adapter is not None:
        trained = count_trained(policy)
        made = Made(parts.engine, policy, parts.rates, parts.policy_parameters, trained)
        home = tokenizer_to_train_with(ctx.inputs)
        return publish_trained(ctx, params, made, lambda: load_policy(start), home, formats, None, keep_frozen=True)
    state = parts.engine.state_of(policy)
    options: dict[str, Any] = {"formats": formats, "may_be_zero": zeros_of(start)}
    dtype = from_main(lambda: publish(policy, state, start, ctx.out, **options))
    say_if_other(ctx, formats, dtype)
    return dtype


def publish_critic(ctx: Context, params: OnPolicyParams, parts: Parts, formats: Formats) -> None:
    """The critic in `value/`: a model with one score, in the policy's formats, or on the policy's base its adapter and head."""
    value, engine = parts.module.value, parts.engine
    folder = ctx.out / VALUE_FOLDER
    if isinstance(value, SharedCritic):
        assert params.adapter is not None
        publish_shared_critic(ctx, params.adapter, value, parts)
    elif isinstance(value, PreTrainedModel):
        state = engine.state_of(value)
        # A critic of its own begins with a head of zeros, and keeps it where no reward ever came.
        may_be_zero = zeros_of(ctx.inputs["value"]) if "value" in ctx.inputs else FRESH_HEAD.__eq__
        options: dict[str, Any] = {"formats": formats, "may_be_zero": may_be_zero}
        from_main(lambda: publish(value, state, ctx.inputs["model"], folder, **options))


def publish_shared_critic(ctx: Context, adapter: AdapterBlock, value: SharedCritic, parts: Parts) -> None:
    """The critic's adapter, as that of the policy, and its head. All processes call it."""
    trained = parts.engine.state_of(value.base_model, trained_only=True)
    head = parts.engine.state_of(value.score)
    folder = ctx.out / VALUE_FOLDER

    def write() -> None:
        unset_hf_deepspeed_config()  # else the model would be split while it is built, which needs all processes
        base = load_policy(ctx.inputs["model"])
        body = with_trained(critic_body(base, ctx, adapter), trained)
        if trained:
            write_adapter(body, block_of(ctx, adapter), ctx, trained, folder)
        folder.mkdir(exist_ok=True)
        save_file(head, folder / VALUE_HEAD)

    from_main(write)
