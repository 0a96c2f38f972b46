"""The policy and, where there is one, its critic as one module, so that one engine trains both.

B: completions of a micro batch, P: tokens of its longest prompt (padded on the left), K: tokens of its longest completion
(padded on the right), T = P + K.

Under an adapter one backbone lies in memory: adapting.py.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.lib.formulas.policy_gradient import logprobs_and_entropy
from stages.lib.formulas.token_losses import cross_entropy_sum
from stages.lib.models.adapters.virtual import behind_virtual_tokens
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
        called, read = read_in_place(model, input_ids, attention_mask)
        logits_BKV = next_token_logits(called, num_new_tokens, read)
        new_BK = input_ids[:, -num_new_tokens:]
        logp_BK, entropy_BK = logprobs_and_entropy(
            logits_BKV, new_BK, temperature=self.temperature, entropy_has_gradients=self.entropy_has_gradients
        )
        if by_reference or self.value is None:
            return Judged(logp_BK, entropy_BK, None)
        called, read = read_in_place(self.value.base_model, input_ids, attention_mask)
        hidden_BTH = called(**read).last_hidden_state
        # V of the state before a token is read off the token that stands there.
        values_BK1 = self.value.score(hidden_BTH[:, -num_new_tokens - 1 : -1])
        return Judged(logp_BK, entropy_BK, values_BK1.squeeze(-1).float())

    def no_part_of_critic(self, input_ids: Tensor) -> Tensor:
        """0, with gradients of 0 for the critic: where a step begins with none, ZeRO-3 goes on with those of the step before."""
        assert self.value is not None
        ids_11 = input_ids[:1, :1]
        called, read = read_in_place(self.value.base_model, ids_11, torch.ones_like(ids_11))
        return 0.0 * self.value.score(called(**read).last_hidden_state).float().sum()


class SharedCritic(nn.Module):
    """A critic on a backbone that others use too: with adapters and a head of its own."""

    def __init__(self, base_model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.base_model = base_model
        self.score = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)


def read_in_place(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Any, dict[str, Any]]:
    """The model to call, and what it is given so that each row reads as it would alone, behind virtual tokens if it has such."""
    called, read = behind_virtual_tokens(model, ids_BT, mask_BT)
    return called, {**read, **positions(called, read, ids_BT.shape[1]), **without_cache(called)}


def positions(model: Any, read: dict[str, Any], num_tokens: int) -> dict[str, Tensor]:
    """The places of the tokens, counted from the first that is no padding, for models that are told places."""
    if "position_ids" not in inspect.signature(innermost(model).forward).parameters:
        return {}
    places = (read["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    # Keys and values that were put before a text are in the mask, and are not read.
    return {"position_ids": places[:, -num_tokens:] if "past_key_values" in read else places}


def next_token_logits(model: Any, num_new_tokens: int, read: dict[str, Any]) -> Tensor:
    """The logits that each of the last `num_new_tokens` tokens was drawn from, B x K x V; the prompt's are not computed."""
    if "logits_to_keep" in inspect.signature(innermost(model).forward).parameters:
        read = read | {"logits_to_keep": num_new_tokens + 1}
    return model(**read).logits[:, -num_new_tokens - 1 : -1]
