"""From a stage's inputs to what the on-policy loop works with: `run_on_policy(ctx, params, algorithm)`, which PPO, GRPO and RLOO share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.stage import Context, Result
from pipeline.store.artifact import MANIFEST, Facts, read_manifest
from stages.lib.generating.generator import Generator
from stages.lib.generating.transformers import TransformersGenerator
from stages.lib.generating.vllm import VllmEngine, VllmGenerator, require_vllm
from stages.lib.models.adapters import with_adapter
from stages.lib.models.config import hidden_size, read_config, text_config
from stages.lib.models.heads import fresh_value, load_policy, load_value
from stages.lib.models.loading import count_parameters, initial_weights
from stages.lib.on_policy.actor_critic import ActorCritic, adapted
from stages.lib.on_policy.loop import Algorithm, Aligned, Parts, align
from stages.lib.on_policy.params import OnPolicyParams, room_problems
from stages.lib.on_policy.ptx import ChatMixture
from stages.lib.on_policy.publish import publish_critic, publish_policy
from stages.lib.on_policy.rewards import check_rows, learned
from stages.lib.on_policy.scoring import RewardModelScorer, Scorer
from stages.lib.text.chat_check import check_chat_template
from stages.lib.text.prompts import Prompts, open_prompts
from stages.lib.text.tokenizers import (
    facts_of_tokenizer,
    load_tokenizer,
    require_same_tokenizer,
    stop_token_ids,
    tokenizer_digest,
)
from stages.lib.training.engine import Engine, freeze
from stages.lib.training.layouts import complete_layout, split_while_loading
from stages.lib.training.optimizer import parameter_groups
from stages.lib.training.params import Batch


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

    generator: Generator = (
        TransformersGenerator(engine, module.policy, make_replica)
        if vllm is None
        else VllmGenerator(engine, module.policy, vllm)
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


def require_own_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, digest: str) -> None:
    """Raises `ArtifactError` if the policy's tokenizer is not the one that it was trained with."""
    if len(tokenizer) > vocabulary_size:
        raise ArtifactError(
            Problem(
                str(folder),
                f"its tokenizer has {len(tokenizer)} tokens, and the model embeds {vocabulary_size}",
                "Use the tokenizer that the model was trained with.",
            )
        )
    if not (folder / MANIFEST).exists():
        return
    recorded = read_manifest(folder).facts.tokenizer_digest
    if recorded is not None and recorded != digest:
        raise ArtifactError(
            Problem(
                str(folder),
                f"its tokenizer ({digest[:8]}) is not the one that its manifest names ({recorded[:8]})",
                "Make the artifact again: `slipway verify` says which file changed.",
            )
        )
