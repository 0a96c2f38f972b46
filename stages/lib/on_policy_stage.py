"""From a stage's inputs to what the on-policy loop works with, and from the trained policy to an artifact.

What PPO, GRPO and RLOO do alike before and after their loop: `run_on_policy(ctx, params, algorithm)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifact import Facts
from pipeline.errors import DataError
from pipeline.stage import Context, Result
from stages.lib.actor_critic import (
    ActorCritic,
    SharedCritic,
    adapted,
    fresh_value,
    load_policy,
    load_value,
    parameter_groups,
    with_adapter,
)
from stages.lib.chat_template import check_chat_template
from stages.lib.distributed import barrier, from_main
from stages.lib.engine import Engine, Generator, complete_layout, freeze, split_while_loading
from stages.lib.models import count_parameters, initial_weights, publish, read_config
from stages.lib.on_policy import Algorithm, Aligned, Parts, align, require_own_vocabulary
from stages.lib.on_policy_params import OnPolicyParams, room_problems
from stages.lib.prompts import Prompts, open_prompts
from stages.lib.ptx import ChatMixture
from stages.lib.rewards import check_rows, learned
from stages.lib.scoring import RewardModelScorer, Scorer
from stages.lib.tokenization import (
    facts_of_tokenizer,
    load_tokenizer,
    require_same_tokenizer,
    stop_token_ids,
    tokenizer_digest,
)
from stages.lib.training_params import Batch
from stages.lib.vllm_generation import VllmEngine, VllmGenerator, require_vllm

ADAPTER_FOLDER = "adapter"
VALUE_FOLDER = "value"
"""Where an artifact keeps the adapter alone, and the critic."""


def run_on_policy(
    ctx: Context, params: OnPolicyParams, algorithm: Algorithm, value_learning_rate: float | None = None
) -> Result:
    """Trains the policy, publishes it to `ctx.out`, and returns its metrics on held-out prompts."""
    start = ctx.inputs["model"]
    config = read_config(start)
    if problems := room_problems(config, params):
        raise DataError(*problems)
    tokenizer = load_tokenizer(start)
    require_own_vocabulary(start, tokenizer, text_config(config)["vocab_size"], tokenizer_digest(tokenizer))
    if "reference" in ctx.inputs:
        require_same_tokenizer(start, ctx.inputs["reference"], "inputs.reference")
    if params.rendering == "chat":
        check_chat_template(tokenizer, str(start))
    prompts, heldout, ledger = open_prompts(
        ctx, tokenizer, params.rendering, params.max_prompt_tokens, params.max_dropped_fraction
    )
    check_rows(params.rewards, ((row.index, row.prompt, row.row) for row in (*prompts.rows, *heldout.rows)))
    mixture = mixture_of(ctx, params, tokenizer)
    critic = critic_folder(ctx, params, tokenizer)

    def build(device: torch.device, batch: Batch) -> Parts:
        return build_parts(
            ctx, params, device, batch, tokenizer, prompts, heldout, mixture, critic, value_learning_rate
        )

    aligned, parts = align(ctx, params, algorithm, build, prompts)
    publish_policy(ctx, params, parts)
    if getattr(params, "publish_critic", False):
        publish_critic(ctx, params, parts)
    metrics = {
        **aligned.after,
        **{f"{name}_base": value for name, value in aligned.before.items()},
        **last_of(aligned),
        **ledger.metrics(),
    }
    facts = Facts(
        **facts_of_tokenizer(tokenizer),
        head_type="causal_lm",
        dtype=params.precision,
        max_length_tokens=params.max_prompt_tokens + params.max_new_tokens,
        parameters=parts.policy_parameters,
        train_rows=len(prompts),
        heldout_rows=len(heldout),
        dropped_rows=dict(ledger.dropped),
        optimizer_steps=aligned.steps,
    )
    return Result(metrics, facts)


def last_of(aligned: Aligned) -> dict[str, float]:
    """What the manifest keeps of the last rollout in training."""
    kept = ("reward", "kl", "kl_coefficient", "entropy", "clipped", "explained_variance", "generator_logprob_gap")
    return {f"train_{name}": aligned.last_rollout[name] for name in kept if name in aligned.last_rollout}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config", config))


def mixture_of(ctx: Context, params: OnPolicyParams, tokenizer: PreTrainedTokenizerBase) -> ChatMixture | None:
    if not params.ptx_coefficient:
        return None
    return ChatMixture(
        ctx,
        tokenizer,
        batch_size=params.ptx_batch_size or params.global_batch_size,
        max_length_tokens=params.ptx_max_length_tokens or params.max_prompt_tokens + params.max_new_tokens,
        total_steps=params.total_steps,
    )


def critic_folder(ctx: Context, params: OnPolicyParams, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Where the critic is loaded from, or None: without one, or with one that shares the policy's backbone (lora).

    That is the input `value` as it is; else the reward model's backbone, if it reads the policy's tokens, else the
    policy's own, with a fresh head.
    """
    if not params.has_critic or params.lora is not None:
        return None
    if "value" in ctx.inputs:
        require_same_tokenizer(ctx.inputs["model"], ctx.inputs["value"], "inputs.value")
        return ctx.inputs["value"]
    reward = ctx.inputs.get("reward")
    of_reward = reward is not None and tokenizer_digest(load_tokenizer(reward)) == tokenizer_digest(tokenizer)
    source = reward if of_reward and reward is not None else ctx.inputs["model"]
    ctx.journal.note(f"the critic starts from the {'reward model' if of_reward else 'policy'} with a head of zeros")
    padding_id = tokenizer.pad_token_id or 0
    return initial_weights(ctx, lambda: fresh_value(source, padding_id, is_reward_model=of_reward))


def build_parts(
    ctx: Context,
    params: OnPolicyParams,
    device: torch.device,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    heldout: Prompts,
    mixture: ChatMixture | None,
    critic: Path | None,
    value_learning_rate: float | None,
) -> Parts:
    """Models, engine, rewards. The frozen models come first, while the memory that training takes is still free."""
    start = ctx.inputs["model"]
    layout = complete_layout(ctx, params, batch, int(hidden_size(read_config(start))))
    chunk = ctx.resources.micro_batch_size or 8
    vllm = None
    if params.generation == "vllm":
        require_vllm(device.type)
        vllm = VllmEngine(
            start,
            precision=params.precision,
            memory_fraction=ctx.resources.generation_memory_fraction,
            max_length_tokens=params.max_prompt_tokens + params.max_new_tokens,
        )
    learned_model = None
    if learned(params.rewards) is not None:
        learned_model = RewardModelScorer(ctx.inputs["reward"], layout, params.precision, device, chunk)
    scorer = Scorer(params.rewards, learned_model)
    with split_while_loading(layout):
        policy = load_policy(start)
        value = load_value(critic) if critic is not None else None
    policy_parameters = count_parameters(policy)  # before adapters become a part of it
    options = {"temperature": params.temperature, "entropy_has_gradients": params.entropy_coefficient > 0}
    if params.lora is not None:
        module = adapted(policy, params.lora, ctx.seed, critic=params.has_critic, **options)
    else:
        module = ActorCritic(policy, value, **options)
    frozen_reference = frozen_reference_of(ctx, params, layout, device)
    if ctx.resources.gradient_checkpointing:
        for model in (module.policy, getattr(module.value, "base_model", None)):
            if model is not None:
                model.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    trained = [(module.policy, params.learning_rate)]
    if module.value is not None:
        trained.append((module.value, value_learning_rate or params.learning_rate))
    groups, rates = parameter_groups(trained, params.weight_decay)
    engine = Engine(ctx, module, groups, params, layout, device)

    def make_replica() -> PreTrainedModel:
        replica = load_policy(start)
        return replica if params.lora is None else with_adapter(replica, params.lora, ctx.seed, "CAUSAL_LM")

    def shared_reference(**inputs: Any) -> Any:
        return engine.infer(**inputs, by_reference=True)

    def own_reference(**inputs: Any) -> Any:
        assert frozen_reference is not None
        with torch.no_grad(), engine.rounding():
            return frozen_reference(**inputs)

    generator: Generator | VllmGenerator = (
        Generator(engine, module.policy, make_replica) if vllm is None else VllmGenerator(engine, module.policy, vllm)
    )
    reference = None
    if params.kl_coefficient:
        reference = own_reference if frozen_reference is not None else shared_reference
    return Parts(
        tokenizer=tokenizer,
        stop_ids=stop_token_ids(tokenizer),
        train=prompts,
        heldout=heldout,
        engine=engine,
        module=module,
        generator=generator,
        rates=rates,
        scorer=scorer,
        reference=reference,
        mixture=mixture,
        parameters=count_parameters(module),
        policy_parameters=policy_parameters,
    )


def hidden_size(config: dict[str, Any]) -> Any:
    inner = text_config(config)
    return next(inner[name] for name in ("hidden_size", "n_embd", "d_model") if name in inner)


def frozen_reference_of(
    ctx: Context, params: OnPolicyParams, layout: dict[str, Any] | None, device: torch.device
) -> nn.Module | None:
    """The reference from its artifact, never from weights in training; None if the policy's own backbone serves as it."""
    folder = ctx.inputs.get("reference", ctx.inputs["model"])
    shared = params.lora is not None and folder == ctx.inputs["model"]
    if not params.kl_coefficient or shared:
        return None
    with split_while_loading(layout):
        reference = ActorCritic(load_policy(folder), temperature=params.temperature)
    return freeze(reference, layout, params.precision, device)


def publish_policy(ctx: Context, params: OnPolicyParams, parts: Parts) -> None:
    """The policy as a whole model; under lora the adapter alone in `adapter/`, and merged into the weights it was trained on."""
    start, engine = ctx.inputs["model"], parts.engine
    state = engine.state_of(parts.module.policy)
    if params.lora is None:
        from_main(lambda: publish(parts.module.policy, state, start, ctx.out, precision=params.precision))
        return
    if ctx.world.is_main:
        save_adapter(parts.module.policy, state, start, ctx.out / ADAPTER_FOLDER)
        base = load_policy(start)
        merged = PeftModel.from_pretrained(base, str(ctx.out / ADAPTER_FOLDER)).merge_and_unload()
        publish(merged, merged.state_dict(), start, ctx.out, precision=params.precision)
    barrier()


def save_adapter(adapted_model: Any, state: dict[str, torch.Tensor], base: Path, folder: Path) -> None:
    """Writes the adapter alone, with where its base lies; the same bytes in every process."""
    config = adapted_model.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)  # peft holds a set, whose order differs from run to run
    adapted_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def publish_critic(ctx: Context, params: OnPolicyParams, parts: Parts) -> None:
    """The critic in `value/`: a model with one score, or under lora its adapter and its head."""
    value, engine = parts.module.value, parts.engine
    folder = ctx.out / VALUE_FOLDER
    if isinstance(value, SharedCritic):
        state, head = engine.state_of(value.base_model), engine.state_of(value.score)
        if ctx.world.is_main:
            save_adapter(value.base_model, state, ctx.inputs["model"], folder)
            save_file(head, folder / "value_head.safetensors")
        barrier()
    elif isinstance(value, PreTrainedModel):
        state = engine.state_of(value)
        from_main(lambda: publish(value, state, ctx.inputs["model"], folder, precision=params.precision))
