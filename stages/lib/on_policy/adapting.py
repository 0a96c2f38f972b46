"""Policy, critic and reference under an adapter, on one backbone that lies in memory once.

The policy is the backbone with the adapter, the critic the same layers with an adapter and a head of its own, and the
reference the same layers as training begins with them: bare, or with the adapter that is continued. The three are modules of
their own whose frozen weights are the same tensors: no adapter is ever switched, which would put gradients at risk. Where a
method trains weights of the model itself (bitfit, freeze), each of the three has its own copy of these and shares the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.formulas.seeds import TORCH_BITS, bounded_seed
from stages.lib.models.adapters.attaching import (
    attach,
    count_trained,
    is_linear,
    own_weights,
    sharing_weights,
    trained_state,
    unwarned,
)
from stages.lib.models.adapters.folders import adapter_folder
from stages.lib.models.adapters.params import AdapterBlock, BottleneckMethod, ContinuedMethod, FreezeMethod, method_name
from stages.lib.models.loading import count_parameters
from stages.lib.on_policy.actor_critic import ActorCritic, SharedCritic
from stages.lib.on_policy.params import WITHOUT_BOTTLENECKS
from stages.lib.training.continuing import (
    block_of,
    require_base_of_adapter,
    saved_config,
    with_adapter_to_train,
)

BODY_TASK = "FEATURE_EXTRACTION"
"""What peft calls the task of layers without a head over the vocabulary."""

ReferenceOnBackbone = Literal["bare", "beginning"]
"""Which reference shares the policy's backbone: the layers without an adapter, or with the one that is continued as it was."""


def adapted(
    base: PreTrainedModel,
    ctx: Context,
    adapter: AdapterBlock,
    *,
    critic: bool,
    reference: ReferenceOnBackbone | None = "bare",
    **options: Any,
) -> ActorCritic:
    """Policy, critic and reference on the weights of `base`. `options` as `ActorCritic` takes them.

    Raises `DataError` or `ArtifactError` where the adapter does not fit the model, or its backbone alone.
    """
    if isinstance(adapter, ContinuedMethod):
        require_base_of_adapter(ctx)
        if isinstance(block_of(ctx, adapter), BottleneckMethod):
            raise DataError(Problem("inputs.adapter", WITHOUT_BOTTLENECKS, "Name a lora, or a model without adapter."))
    own = own_weights(base, block_of(ctx, adapter))
    bare = sharing_weights(base, own).requires_grad_(False) if reference == "bare" else None
    value = SharedCritic(critic_body(base, ctx, adapter), width_of_body(base)) if critic else None
    policy = with_adapter_to_train(base, ctx, adapter)
    if reference == "beginning":
        bare = sharing_weights(policy, trained_state(policy)).requires_grad_(False)
    module = ActorCritic(policy, value, bare, **options)
    if value is not None:
        both = {id(weight) for weight in trained_state(policy).values()} & set(map(id, trained_state(value).values()))
        assert not both, "policy and critic never train the same parameter"
    say_what_is_trained(ctx, adapter, module)
    return module


def width_of_body(base: PreTrainedModel) -> int:
    """The size of the body's last hidden state, which a critic's head reads."""
    return int(base.config.get_text_config().hidden_size)


def say_what_is_trained(ctx: Context, adapter: AdapterBlock, module: ActorCritic) -> None:
    """Tells the journal how much of policy and critic is trained."""
    trained, whole = count_trained(module.policy), count_parameters(module.policy)
    critic = (
        f", and {count_trained(module.value):,} of a critic on the same backbone" if module.value is not None else ""
    )
    method = method_name(type(adapter))
    ctx.journal.note(f"{method} trains {trained:,} of {whole:,} parameters ({trained / whole:.3%}){critic}")


def critic_body(base: PreTrainedModel, ctx: Context, adapter: AdapterBlock) -> Any:
    """The layers of `base` without its head over the vocabulary, under an adapter of the critic's own.

    Of a continued adapter that is a fresh one of the same form. A method that trains nothing but the head over the vocabulary
    leaves the layers as they are.
    """
    block, seed = block_of(ctx, adapter), ctx.seed + 1
    if isinstance(block, ContinuedMethod):
        config = saved_config(adapter_folder(ctx.inputs["adapter"]))
        config.task_type = BODY_TASK
        config.target_modules = in_body(base, config.target_modules)
        config.modules_to_save = modules_in_body(base, config.modules_to_save)
        for field in ("exclude_modules", "target_parameters"):
            if getattr(config, field, None):
                setattr(config, field, in_body(base, getattr(config, field)))
        for field in ("rank_pattern", "alpha_pattern"):
            if getattr(config, field, None):
                setattr(config, field, patterns_in_body(base, getattr(config, field)))
        torch.manual_seed(bounded_seed(seed, TORCH_BITS))
        with unwarned():
            return get_peft_model(sharing_weights(base.base_model), config)
    changes: dict[str, Any] = {}
    for field in ("target_modules", "feedforward_modules", "target_parameters"):
        if getattr(block, field, None):
            changes[field] = in_body(base, getattr(block, field))
    for field in ("modules_to_save", "modules"):
        if getattr(block, field, None):
            changes[field] = modules_in_body(base, getattr(block, field))
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(block, field, None):
            changes[field] = patterns_in_body(base, getattr(block, field))
    fitting = block.model_copy(update=changes)
    names_nothing = isinstance(fitting, FreezeMethod) and fitting.modules is None and fitting.last_layers is None
    if names_nothing and not fitting.only_new:
        return sharing_weights(base.base_model).requires_grad_(False)
    body = sharing_weights(base.base_model, own_weights(base.base_model, fitting))
    return attach(body, fitting, seed, BODY_TASK)


def in_body(base: PreTrainedModel, target_modules: Any) -> Any:
    """Names of linear layers as the body has them; of a pattern, which is one of whole paths, the paths that it matches there."""
    home = f"{base.base_model_prefix}."
    if not isinstance(target_modules, str):
        names = sorted(target_modules) if isinstance(target_modules, set) else target_modules
        return [name.removeprefix(home) for name in names]
    linear = [name for name, layer in base.base_model.named_modules() if is_linear(layer)]
    return [name for name in linear if re.fullmatch(target_modules, f"{home}{name}")] or target_modules


def patterns_in_body(base: PreTrainedModel, patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns of ends of paths as the body has them, in their order, of which peft takes the first that matches.

    One that only matches whole paths of the model becomes the paths that it matches there.
    """
    home = f"{base.base_model_prefix}."
    body = base.base_model
    paths = [*dict(body.named_modules()), *dict(body.named_parameters())]
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        near = pattern.removeprefix(home)
        names = [near]
        if not any(ends_like(near, path) for path in paths):
            names = [re.escape(path) for path in paths if path and ends_like(pattern, f"{home}{path}")] or names
        for name in names:
            found.setdefault(name, value)
    return found


def ends_like(pattern: str, path: str) -> bool:
    """Whether peft lets the pattern decide of the layer at this path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def modules_in_body(base: PreTrainedModel, names: Any) -> list[str] | None:
    """Those of the names that are modules of the body, too, as the body has them; None where none is."""
    home = f"{base.base_model_prefix}."
    paths = [f".{home}{name}" for name, part in base.base_model.named_modules() if name and has_weights(part)]
    found = [name for name in names or () if any(path.endswith(f".{name}") for path in paths)]
    return [name.removeprefix(home) for name in found] or None


def has_weights(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None
