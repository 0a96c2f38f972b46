"""The policy and, where there is one, its critic as one module, so that one engine trains both.

B: completions of a micro batch, P: tokens of its longest prompt (padded on the left), K: tokens of its longest completion
(padded on the right), T = P + K.

With LoRA one backbone lies in memory: the policy is its layers with an adapter, the critic the same layers with another
adapter and a head of its own, and the reference the same layers with none. The three are modules of their own, whose frozen
weights are the same tensors: no adapter is ever switched, which would put gradients at risk.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.lib.formulas.policy_gradient import logprobs_and_entropy
from stages.lib.formulas.token_losses import cross_entropy_sum
from stages.lib.models.adapters.attaching import require_linear, sharing_weights, with_adapter
from stages.lib.models.adapters.params import LoraParams
from stages.lib.models.asking import innermost, without_cache


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
            output = self.policy(input_ids=input_ids, attention_mask=attention_mask, **without_cache(self.policy))
            nats = cross_entropy_sum(output.logits, targets_BT)
            return nats if self.value is None else nats + self.no_part_of_critic(input_ids)
        model = self.reference if by_reference else self.policy
        masked = {"attention_mask": attention_mask}
        options = {**positions(model, attention_mask), **masked, **without_cache(model)}
        logits_BKV = next_token_logits(model, input_ids, num_new_tokens, options)
        new_BK = input_ids[:, -num_new_tokens:]
        logp_BK, entropy_BK = logprobs_and_entropy(
            logits_BKV, new_BK, temperature=self.temperature, entropy_has_gradients=self.entropy_has_gradients
        )
        if by_reference or self.value is None:
            return Judged(logp_BK, entropy_BK, None)
        backbone = self.value.base_model
        options = {**positions(backbone, attention_mask), **masked, **without_cache(backbone)}
        hidden_BTH = backbone(input_ids=input_ids, **options).last_hidden_state
        # V of the state before a token is read off the token that stands there.
        values_BK1 = self.value.score(hidden_BTH[:, -num_new_tokens - 1 : -1])
        return Judged(logp_BK, entropy_BK, values_BK1.squeeze(-1).float())

    def no_part_of_critic(self, input_ids: Tensor) -> Tensor:
        """0, with gradients of 0 for the critic: where a step begins with none, ZeRO-3 goes on with those of the step before."""
        assert self.value is not None
        hidden_11H = self.value.base_model(
            input_ids=input_ids[:1, :1], **without_cache(self.value.base_model)
        ).last_hidden_state
        return 0.0 * self.value.score(hidden_11H).float().sum()


class SharedCritic(nn.Module):
    """A critic on a backbone that others use too: with adapters and a head of its own."""

    def __init__(self, base_model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.base_model = base_model
        self.score = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)


def adapted(base: PreTrainedModel, lora: LoraParams, seed: int, *, critic: bool, **options: Any) -> ActorCritic:
    """Policy, critic and reference on the weights of `base`, which lie in memory once.

    Raises `DataError` where `lora` names layers that the backbone does not have.
    """
    require_linear(base.base_model, lora.target_modules, "params.lora.target_modules")
    reference = sharing_weights(base).requires_grad_(False)
    value = None
    if critic:
        backbone = with_adapter(sharing_weights(base.base_model), lora, seed + 1, "FEATURE_EXTRACTION")
        value = SharedCritic(backbone, base.config.get_text_config().hidden_size)
    policy = with_adapter(base, lora, seed, "CAUSAL_LM")
    return ActorCritic(policy, value, reference, **options)


def positions(model: Any, attention_mask: Tensor) -> dict[str, Tensor]:
    """The places of the tokens, counted from the first that is no padding, for models that are told places."""
    if "position_ids" not in inspect.signature(innermost(model).forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}


def next_token_logits(model: Any, input_ids: Tensor, num_new_tokens: int, options: dict[str, Any]) -> Tensor:
    """The logits that each of the last `num_new_tokens` tokens was drawn from, B x K x V; the prompt's are not computed."""
    if "logits_to_keep" in inspect.signature(innermost(model).forward).parameters:
        options = options | {"logits_to_keep": num_new_tokens + 1}
    return model(input_ids=input_ids, **options).logits[:, -num_new_tokens - 1 : -1]
