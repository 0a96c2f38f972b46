"""Completions of many prompts at once, each drawn with random numbers of its own.

A token is drawn by turning one uniform number into a place of the cumulative distribution. The number is a function of
(seed, position of the completion, place of the token), so that a completion depends neither on its neighbours in the
batch nor on the number of processes nor on what was drawn before; and nothing has to be restored after a restart.

B: completions of a batch, K: tokens that each may have, V: vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from stages.lib.training.scheduling import seed_of


@dataclass(frozen=True)
class Sampled:
    """One completion: its ids, the stop id that ended it included, and log-probabilities as the generator saw them."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    ended: bool
    """Whether a stop id ended it; otherwise it was cut off at the limit."""


def uniforms_for(seed: int, position: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for the completion at `position`: the same for the same seed and position."""
    return np.random.Generator(np.random.PCG64(seed_of(seed, position))).random(count)


class DrawByUniforms(LogitsProcessor):
    """Draws each row's next token from its uniform number, and leaves that token as the only one to choose.

    So greedy decoding samples: exactly, from softmax(logits / temperature). Temperature 0 takes the likeliest token.
    """

    def __init__(self, uniforms_BK: NDArray[np.float64], prompt_length: int, temperature: float) -> None:
        self.uniforms_BK = torch.from_numpy(uniforms_BK)
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logp_BV = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature == 0:
            token_B1 = logp_BV.argmax(-1, keepdim=True)
        else:
            place = input_ids.shape[1] - self.prompt_length
            # In double precision, or large vocabularies would lose their unlikely tokens to rounding.
            cumulative_BV = logp_BV.double().exp().cumsum(-1)
            drawn_B1 = self.uniforms_BK[:, place : place + 1].to(scores.device) * cumulative_BV[:, -1:]
            token_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True).clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(logp_BV.gather(-1, token_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)  # type: ignore[return-value]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms_BK: NDArray[np.float64],
    *,
    stop_ids: Sequence[int],
    padding_id: int,
    temperature: float,
) -> list[Sampled]:
    """A completion of each prompt, of at most K tokens with K numbers in each row of `uniforms_BK`.

    `model` is one of transformers, or an engine with a `sample` of its own (vllm_generation.py).
    """
    if hasattr(model, "sample"):
        own: list[Sampled] = model.sample(prompts, uniforms_BK, stop_ids=stop_ids, temperature=temperature)
        return own
    return sample_by_transformers(
        model, prompts, uniforms_BK, stop_ids=stop_ids, padding_id=padding_id, temperature=temperature
    )


@torch.no_grad()
def sample_by_transformers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BK: NDArray[np.float64],
    *,
    stop_ids: Sequence[int],
    padding_id: int,
    temperature: float,
) -> list[Sampled]:
    """`sample` with `generate`, greedily, because `DrawByUniforms` leaves one token to choose."""
    drawing = DrawByUniforms(uniforms_BK, max(map(len, prompts)), temperature)
    new_BK = continuations(
        model, prompts, uniforms_BK.shape[1], [drawing], stop_ids=stop_ids, padding_id=padding_id
    ).numpy()
    logp_BK = torch.stack(drawing.logprobs, dim=1).float().cpu().numpy()
    return [cut(ids_K, logp_K, stop_ids) for ids_K, logp_K in zip(new_BK, logp_BK, strict=True)]


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor],
    *,
    stop_ids: Iterable[int],
    padding_id: int,
) -> Tensor:
    """The ids that follow each prompt, B x K on the CPU: the likeliest after the processors, padding behind a stop id.

    The prompts are padded on the left. K: `max_new_tokens`, or less if all end sooner.
    """
    length = max(map(len, prompts))
    ids_BT = torch.tensor([[padding_id] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=padding_id,
        use_cache=True,
    )
    with only_this_generation_config(model, config):
        output_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            logits_processor=LogitsProcessorList(processors),
        )
    new_BK: Tensor = output_BT[:, length:].cpu()
    return new_BK


def cut(ids_K: NDArray[np.int64], logp_K: NDArray[np.float32], stop_ids: Sequence[int]) -> Sampled:
    """The completion up to the first stop id; what follows is padding."""
    stops = np.flatnonzero(np.isin(ids_K, list(stop_ids)))
    end = int(stops[0]) + 1 if len(stops) else len(ids_K)
    return Sampled(ids_K[:end].astype(np.int64), logp_K[:end].astype(np.float32), ended=bool(len(stops)))


@contextlib.contextmanager
def only_this_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keeps what the model's own generation config says (a repetition penalty, say) out of the distribution drawn from."""
    # A model under adapters hands its config down to the model within when it generates, and would leave it there.
    within = [model.get_base_model()] if hasattr(model, "get_base_model") else []
    own = [(each, each.generation_config) for each in (model, *within)]
    model.generation_config = config
    try:
        yield
    finally:
        for each, its_own in own:
            each.generation_config = its_own
