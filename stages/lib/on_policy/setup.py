"""From a stage's inputs to what the on-policy loop works with: `run_on_policy(ctx, params, algorithm)`, which PPO, GRPO and RLOO share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from stages.lib.models.adapters.folders import tokenizer_to_train_with
from stages.lib.models.adapters.params import ContinuedMethod
from stages.lib.models.config import hidden_size, read_config, text_config
from stages.lib.models.formats import formats_to_publish
from stages.lib.models.generation import note_generation
from stages.lib.models.heads import fresh_value, load_policy, load_value
from stages.lib.models.loading import count_parameters, initial_weights
from stages.lib.on_policy.actor_critic import ActorCritic, Judged
from stages.lib.on_policy.adapting import ReferenceOnBackbone, adapted
from stages.lib.on_policy.contained_calls import Means
from stages.lib.on_policy.forecast import room_problems
from stages.lib.on_policy.loop import align
from stages.lib.on_policy.params import OnPolicyParams
from stages.lib.on_policy.parts import Algorithm, Aligned, Parts
from stages.lib.on_policy.ptx import ChatMixture
from stages.lib.on_policy.publish import publish_critic, publish_policy
from stages.lib.on_policy.quiet import switch_dropout_off
from stages.lib.on_policy.reward_params import learned
from stages.lib.on_policy.scoring import RewardModelScorer, Scorer, require_scorable
from stages.lib.on_policy.turns import Unfolding, unfolding_of
from stages.lib.preferring.reward_reading import RewardReading, reading_in
from stages.lib.text.batches import padding_of
from stages.lib.text.chat_check import check_chat_template
from stages.lib.text.prompts import Prompts, open_prompts
from stages.lib.text.tokenizers import (
    facts_of_tokenizer,
    load_tokenizer,
    require_same_tokenizer,
    stop_token_ids,
    tokenizer_digest,
)
from stages.lib.training.continuing import with_adapter_to_train
from stages.lib.training.engine import Engine, freeze
from stages.lib.training.layouts import complete_layout, fit_to_width, split_while_loading
from stages.lib.training.making import rate_factors
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
    home = tokenizer_to_train_with(ctx.inputs)
    tokenizer = load_tokenizer(home)
    require_own_vocabulary(start, tokenizer, text_config(config)["vocab_size"], tokenizer_digest(tokenizer))
    if "reference" in ctx.inputs:
        require_same_tokenizer(start, ctx.inputs["reference"], "inputs.reference")
    if params.rendering == "chat":
        check_chat_template(tokenizer, str(home))
    prompts, heldout, ledger = open_prompts(
        ctx, tokenizer, params.rendering, params.max_prompt_tokens, params.max_dropped_fraction
    )
    rows = (*prompts.rows, *heldout.rows)
    turns = None if params.episodes is None else ()
    require_scorable(ctx, params.rewards, rows, turns)
    opened = Opened(
        tokenizer=tokenizer,
        prompts=prompts,
        heldout=heldout,
        mixture=mixture_of(ctx, params, tokenizer),
        critic=critic_folder(ctx, params, tokenizer),
        value_learning_rate=value_learning_rate,
        unfolding=unfolding_of(ctx, params.episodes, tokenizer, rows),
    )
    build = functools.partial(build_parts, ctx, params, opened)
    formats = formats_to_publish(ctx, params.precision, params.published_dtype)
    note_generation(ctx)
    aligned, parts = align(ctx, params, algorithm, build, prompts)
    dtype = publish_policy(ctx, params, parts, formats)
    if getattr(params, "publish_critic", False):
        publish_critic(ctx, params, parts, formats)
    metrics = {
        **aligned.after,
        **{f"{name}_base": value for name, value in aligned.before.items()},
        **last_of(aligned),
        **ledger.metrics(),
    }
    facts = Facts(
        **facts_of_tokenizer(tokenizer),
        head_type="causal_lm",
        dtype=dtype,
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
    kept = (
        "reward",
        "reward_drawn",
        "kl",
        "kl_coefficient",
        "entropy",
        "clipped",
        "accuracy",
        "margin",
        "pairs_left_out",
        "explained_variance",
        "generator_logprob_gap",
    )
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
    """Where the critic is loaded from, or None: without one, or with one that shares the policy's backbone (under an adapter).

    That is the input `value` as it is; else the reward model's backbone, if it reads the policy's tokens and judges whole
    answers, else the policy's own, with a fresh head.
    """
    if not params.has_critic or params.adapter is not None:
        return None
    if "value" in ctx.inputs:
        require_same_tokenizer(ctx.inputs["model"], ctx.inputs["value"], "inputs.value")
        return ctx.inputs["value"]
    reward = ctx.inputs.get("reward")
    of_reward = (
        reward is not None
        and isinstance(reading_in(read_config(reward), str(reward)), RewardReading)
        and tokenizer_digest(load_tokenizer(reward)) == tokenizer_digest(tokenizer)
    )
    source = reward if of_reward and reward is not None else ctx.inputs["model"]
    ctx.journal.note(f"the critic starts from the {'reward model' if of_reward else 'policy'} with a head of zeros")
    padding_id = padding_of(tokenizer)
    return initial_weights(ctx, lambda: fresh_value(source, padding_id, is_reward_model=of_reward))


@dataclass(frozen=True)
class Opened:
    """What a stage is given, read and checked."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    heldout: Prompts
    mixture: ChatMixture | None
    critic: Path | None
    """Where the critic is loaded from."""
    value_learning_rate: float | None
    unfolding: Unfolding | None


def build_parts(ctx: Context, params: OnPolicyParams, opened: Opened, device: torch.device, batch: Batch) -> Parts:
    """Models, engine, rewards. The frozen models come first, while the memory that training takes is still free."""
    start = ctx.inputs["model"]
    layout = fit_to_width(complete_layout(ctx.resources, params, batch), int(hidden_size(read_config(start))))
    vllm = start_vllm(ctx, params, device)
    scorer = make_scorer(ctx, params, layout, device)
    with split_while_loading(layout):
        policy = load_policy(start)
        value = load_value(opened.critic) if opened.critic is not None else None
    policy_parameters = count_parameters(policy)  # before adapters become a part of it
    with split_while_loading(layout):  # else peft would take the split weights that it begins with for whole ones
        module = make_module(ctx, params, policy, value)
    frozen_reference = frozen_reference_of(ctx, params, layout, device)
    trained = [(module.policy, params.learning_rate)]
    if module.value is not None:
        trained.append((module.value, opened.value_learning_rate or params.learning_rate))
    groups, rates = parameter_groups(trained, params.weight_decay, rate_factors(params))
    engine = Engine(ctx, module, groups, params, layout, device)
    reference = reference_of(params, engine, frozen_reference)
    switch_dropout_off(engine, int(policy.config.get_text_config().vocab_size), reference)
    return Parts(
        tokenizer=opened.tokenizer,
        stop_ids=stop_token_ids(opened.tokenizer),
        train=opened.prompts,
        heldout=opened.heldout,
        engine=engine,
        module=module,
        generator=make_generator(ctx, params, engine, module, vllm),
        rates=rates,
        scorer=scorer,
        reference=reference,
        mixture=opened.mixture,
        parameters=count_parameters(module),
        policy_parameters=policy_parameters,
        unfolding=opened.unfolding,
    )


def start_vllm(ctx: Context, params: OnPolicyParams, device: torch.device) -> VllmEngine | None:
    if params.generation != "vllm":
        return None
    require_vllm(device.type)
    return VllmEngine(
        ctx.inputs["model"],
        precision=params.precision,
        memory_fraction=ctx.resources.generation_memory_fraction,
        max_length_tokens=params.max_prompt_tokens + params.max_new_tokens,
    )


def make_scorer(ctx: Context, params: OnPolicyParams, layout: Mapping[str, Any] | None, device: torch.device) -> Scorer:
    means = Means(at_a_time=ctx.resources.threads_per_process, asked_to_stop=ctx.going_on_alone)
    reward = learned(params.rewards)
    if reward is None:
        return Scorer(params.rewards, None, means)
    chunk, penalty = ctx.resources.micro_batch_size or 8, reward.uncertainty_penalty
    model = RewardModelScorer(ctx.inputs["reward"], layout, params.precision, device, chunk, penalty)
    return Scorer(params.rewards, model, means)


def make_module(
    ctx: Context, params: OnPolicyParams, policy: PreTrainedModel, value: PreTrainedModel | None
) -> ActorCritic:
    """Policy and critic as one module, ready to be trained; under an adapter on one backbone, with the reference if it can be."""
    options = {"temperature": params.temperature, "entropy_has_gradients": params.entropy_coefficient > 0}
    if params.adapter is not None:
        reference = reference_on_backbone(ctx, params)
        module = adapted(policy, ctx, params.adapter, critic=params.has_critic, reference=reference, **options)
    else:
        module = ActorCritic(policy, value, **options)
    if ctx.resources.gradient_checkpointing:
        for model in (module.policy, getattr(module.value, "base_model", None)):
            if model is not None:
                model.gradient_checkpointing_enable({"use_reentrant": False})
    return module.train()


def make_generator(
    ctx: Context, params: OnPolicyParams, engine: Engine, module: ActorCritic, vllm: VllmEngine | None
) -> Generator:
    if vllm is not None:
        return VllmGenerator(engine, module.policy, vllm)

    def make_replica() -> PreTrainedModel:
        replica = load_policy(ctx.inputs["model"])
        return replica if params.adapter is None else with_adapter_to_train(replica, ctx, params.adapter)

    return TransformersGenerator(engine, module.policy, make_replica, beside_training=params.background_rollouts)


def reference_of(
    params: OnPolicyParams, engine: Engine, frozen_reference: nn.Module | None
) -> Callable[..., Judged] | None:
    """The reference's judgement: of a model of its own, or of the policy's backbone; None where nothing holds the policy."""

    def shared(*inputs: Any, **named: Any) -> Any:
        return engine.infer(*inputs, **named, by_reference=True)

    def own(*inputs: Any, **named: Any) -> Any:
        assert frozen_reference is not None
        with torch.no_grad(), engine.rounding():
            return frozen_reference(*inputs, **named)

    if not params.kl_coefficient:
        return None
    return shared if frozen_reference is None else own


def reference_on_backbone(ctx: Context, params: OnPolicyParams) -> ReferenceOnBackbone | None:
    """Which reference shares the policy's backbone: what training begins with, or by name the input `model` without an adapter.

    None where there is none, or it is a model of its own.
    """
    if params.adapter is None or not params.kl_coefficient:
        return None
    if "reference" in ctx.inputs:
        return "bare" if ctx.inputs["reference"] == ctx.inputs["model"] else None
    return "beginning" if isinstance(params.adapter, ContinuedMethod) else "bare"


def frozen_reference_of(
    ctx: Context, params: OnPolicyParams, layout: dict[str, Any] | None, device: torch.device
) -> nn.Module | None:
    """The reference from its artifact, never from weights in training; None if the policy's own backbone serves as it."""
    if not params.kl_coefficient or reference_on_backbone(ctx, params) is not None:
        return None
    folder = ctx.inputs.get("reference", ctx.inputs["model"])
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
