"""The policy and, where there is one, its critic as one module, so that one engine trains both.

B: completions of a micro batch, P: tokens of its longest prompt (padded on the left), K: tokens of its longest completion
(padded on the right), T = P + K.

With LoRA one backbone lies in memory: the policy is its layers with an adapter, the critic the same layers with another
adapter and a head of its own, and the reference the same layers with none. The three are modules of their own, whose frozen
weights are the same tensors: no adapter is ever switched, which would put gradients at risk.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.errors import ArtifactError, DataError, Problem, did_you_mean
from stages.lib.losses import cross_entropy_sum
from stages.lib.models import load_model, without_dropout
from stages.lib.on_policy_params import LoraParams
from stages.lib.policy_gradient import logprobs_and_entropy
from stages.lib.reward_models import add_reward_head


class Judged(NamedTuple):
    """What the module says of completions, each B x K: log-probability and entropy of every token, and V of the state before it."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class ActorCritic(nn.Module):
    """`policy`: a causal model. `value`: a model with the layers `base_model` and a linear head `score`, or None.

    `reference`: what shares the policy's backbone, so that it must be in the same engine; None where it is elsewhere.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value: nn.Module | None = None,
        reference: PreTrainedModel | None = None,
        *,
        temperature: float = 1.0,
        entropy_has_gradients: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.reference = reference
        self.temperature = temperature
        self.entropy_has_gradients = entropy_has_gradients

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_new_tokens: int = 0,
        targets_BT: Tensor | None = None,
        by_reference: bool = False,
    ) -> Judged | Tensor:
        """What policy and critic say of the last `num_new_tokens` tokens; `by_reference`: what the reference says.

        With `targets_BT`: the summed cross-entropy of the policy. Everything is one method, because data parallelism and
        DeepSpeed see only this one.
        """
        if targets_BT is not None:
            output = self.policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            nats = cross_entropy_sum(output.logits, targets_BT)
            return nats if self.value is None else nats + self.no_part_of_critic(input_ids)
        model = self.reference if by_reference else self.policy
        options = {**positions(model, attention_mask), "attention_mask": attention_mask, "use_cache": False}
        logits_BKV = next_token_logits(model, input_ids, num_new_tokens, options)
        new_BK = input_ids[:, -num_new_tokens:]
        logp_BK, entropy_BK = logprobs_and_entropy(
            logits_BKV, new_BK, temperature=self.temperature, entropy_has_gradients=self.entropy_has_gradients
        )
        if by_reference or self.value is None:
            return Judged(logp_BK, entropy_BK, None)
        hidden_BTH = self.value.base_model(input_ids=input_ids, **options).last_hidden_state
        # V of the state before a token is read off the token that stands there.
        values_BK1 = self.value.score(hidden_BTH[:, -num_new_tokens - 1 : -1])
        return Judged(logp_BK, entropy_BK, values_BK1.squeeze(-1).float())

    def no_part_of_critic(self, input_ids: Tensor) -> Tensor:
        """0, with gradients of 0 for the critic: where a step begins with none, ZeRO-3 goes on with those of the step before."""
        assert self.value is not None
        hidden_11H = self.value.base_model(input_ids=input_ids[:1, :1], use_cache=False).last_hidden_state
        return 0.0 * self.value.score(hidden_11H).float().sum()


class SharedCritic(nn.Module):
    """A critic on a backbone that others use too: with adapters and a head of its own."""

    def __init__(self, base_model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.base_model = base_model
        self.score = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)


def sharing_weights(model: nn.Module) -> Any:
    """Another model of the same layers with the very same weights: what is trained in it must be added to it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def with_adapter(model: Any, lora: LoraParams, seed: int, task: str) -> Any:
    """The model frozen under a fresh adapter, which is the same in every process and every memory layout."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules or "all-linear",
        task_type=task,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def require_layers(backbone: nn.Module, names: list[str]) -> None:
    """Raises `DataError` if one of the names is that of no linear layer; peft would pass over it while others are found."""
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    problems = [
        Problem("params.lora.target_modules", f"the model has no linear layer '{name}'", did_you_mean(name, known))
        for name in names
        if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]
    if problems:
        raise DataError(*problems)


def adapted(base: PreTrainedModel, lora: LoraParams, seed: int, *, critic: bool, **options: Any) -> ActorCritic:
    """Policy, critic and reference on the weights of `base`, which lie in memory once.

    Raises `DataError` where `lora` names layers that the backbone does not have.
    """
    require_layers(base.base_model, lora.target_modules or [])
    reference = sharing_weights(base).requires_grad_(False)
    value = None
    if critic:
        backbone = with_adapter(sharing_weights(base.base_model), lora, seed + 1, "FEATURE_EXTRACTION")
        value = SharedCritic(backbone, base.config.get_text_config().hidden_size)
    policy = with_adapter(base, lora, seed, "CAUSAL_LM")
    return ActorCritic(policy, value, reference, **options)


def positions(model: Any, attention_mask: Tensor) -> dict[str, Tensor]:
    """The places of the tokens, counted from the first that is no padding, for models that are told places."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}


def next_token_logits(model: Any, input_ids: Tensor, num_new_tokens: int, options: dict[str, Any]) -> Tensor:
    """The logits that each of the last `num_new_tokens` tokens was drawn from, B x K x V; the prompt's are not computed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        options = options | {"logits_to_keep": num_new_tokens + 1}
    return model(input_ids=input_ids, **options).logits[:, -num_new_tokens - 1 : -1]  # type: ignore[no-any-return]


# How the two come into memory


def load_policy(folder: Path) -> PreTrainedModel:
    """The causal model in `folder`, without dropout: the ratio of a policy to itself must be 1."""
    return without_dropout(load_model(AutoModelForCausalLM, folder))


def load_value(folder: Path) -> PreTrainedModel:
    """The critic in `folder`: a model with one score. Raises `ArtifactError` if its head cannot be put on every token."""
    model = without_dropout(load_model(AutoModelForSequenceClassification, folder))
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ArtifactError(
            Problem(
                str(folder),
                f"{type(model).__name__} has no linear head named score, which a critic puts on every token",
                "Choose another architecture.",
            )
        )
    return model


def fresh_value(folder: Path, padding_id: int, *, is_reward_model: bool) -> PreTrainedModel:
    """A critic on the backbone in `folder` with a head of zeros: it says 0 until it knows better (Huang et al., 2024)."""
    model = load_value(folder) if is_reward_model else add_reward_head(folder, padding_id)
    nn.init.zeros_(model.score.weight)
    if getattr(model.score, "bias", None) is not None:
        nn.init.zeros_(model.score.bias)
    return model


def parameter_groups(
    modules: list[tuple[nn.Module, float]], weight_decay: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Groups for the optimizer, and the highest learning rate of each: per module its matrices, then its norms and biases.

    Weight decay is for matrices only.
    """
    groups, rates = [], []
    for module, rate in modules:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            # Under ZeRO-3 a parameter's own shape is that of its part.
            members = [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) >= 2) is wanted]
            if members:
                groups.append({"params": members, "weight_decay": decay})
                rates.append(rate)
    return groups, rates
