"""Completions of many prompts at once, each drawn with random numbers of its own.

A token is drawn by turning one uniform number into a place of the cumulative distribution. The number is a function of
(seed, position of the completion, place of the token), so that a completion depends neither on its neighbours in the
batch nor on the number of processes nor on what was drawn before; and nothing has to be restored after a restart.

B: completions of a batch, T: tokens of their prompts, padded on the left, K: tokens that each may have, V: vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from stages.lib.models.adapters.virtual import behind_virtual_tokens, embeds_virtual_tokens
from stages.lib.training.scheduling import seed_of

PADDING_ID = 0
"""Before shorter prompts and behind what has ended. Any id would do: masks and places tell what is padding."""


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

    So greedy decoding samples: exactly, from softmax(logits / temperature), of which below `top_p` 1 only the likeliest
    tokens that hold that much of the probability are left (Holtzman et al., 2020). Temperature 0 takes the likeliest token.
    """

    def __init__(
        self, uniforms_BK: NDArray[np.float64], prompt_length: int, temperature: float, top_p: float = 1.0
    ) -> None:
        self.uniforms_BK = torch.from_numpy(uniforms_BK)
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scaled_BV = scores.float() / (self.temperature or 1.0)
        if self.temperature and self.nucleus:
            scaled_BV = self.nucleus(input_ids, scaled_BV)
        logp_BV = scaled_BV.log_softmax(-1)
        if self.temperature == 0:
            token_B1 = scores.argmax(-1, keepdim=True)
        else:
            place = input_ids.shape[1] - self.prompt_length
            # In double precision, or large vocabularies would lose their unlikely tokens to rounding.
            cumulative_BV = logp_BV.double().exp().cumsum(-1)
            drawn_B1 = self.uniforms_BK[:, place : place + 1].to(scores.device) * cumulative_BV[:, -1:]
            token_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True).clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(logp_BV.gather(-1, token_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


class TokenStream(BaseStreamer):  # type: ignore[misc]
    """Hands on the tokens of a single completion as they come, the stop id included."""

    def __init__(self, on_token: Callable[[int], Any]) -> None:
        self.on_token = on_token
        self.in_prompt = True

    def put(self, value: Tensor) -> None:
        if not self.in_prompt:
            self.on_token(int(value))
        self.in_prompt = False

    def end(self) -> None:
        """Nothing is held back."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BK: NDArray[np.float64],
    *,
    stop_ids: Iterable[int],
    temperature: float,
    top_p: float = 1.0,
    on_token: Callable[[int], Any] | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[Sampled]:
    """A completion of each prompt, of at most K tokens with K numbers in each row of `uniforms_BK`.

    All text that models of transformers write is written here, by `generate`, greedily, because `DrawByUniforms` leaves
    one token to choose. Of a single prompt's completion `on_token` is told each token as it comes. `adapter_names`: which
    adapter of peft's model each row is written under (`models/adapters/rows.py`).
    """
    stops, length = sorted(stop_ids), max(map(len, prompts))
    ids_BT = torch.tensor([[PADDING_ID] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=uniforms_BK.shape[1],
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=PADDING_ID,
        use_cache=True,
    )
    writer, read, length = what_is_read(model, ids_BT.to(model.device), mask_BT.to(model.device))
    drawing = DrawByUniforms(uniforms_BK, length, temperature, top_p)
    with only_this_generation_config(model, config):
        output_BT = writer.generate(
            **read,
            logits_processor=LogitsProcessorList([drawing]),
            streamer=TokenStream(on_token) if on_token else None,
            **({"adapter_names": list(adapter_names)} if adapter_names is not None else {}),
        )
    new_BK = output_BT[:, length:].cpu().numpy()
    logp_BK = torch.stack(drawing.logprobs, dim=1).float().cpu().numpy()
    return [cut(ids_K, logp_K, stops) for ids_K, logp_K in zip(new_BK, logp_BK, strict=True)]


def what_is_read(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Any, dict[str, Tensor], int]:
    """Which model writes, what `generate` is given of the prompts, and how many of these tokens stand in what it returns.

    Embeddings that an adapter puts before a text are put between its padding and the text.
    """
    if not embeds_virtual_tokens(model):
        return model, {"input_ids": ids_BT, "attention_mask": mask_BT}, ids_BT.shape[1]
    base, read = behind_virtual_tokens(model, ids_BT, mask_BT)
    return base, read, 0


def cut(ids_K: NDArray[np.int64], logp_K: NDArray[np.float32], stop_ids: Sequence[int]) -> Sampled:
    """The completion up to the first stop id; what follows is padding."""
    stops = np.flatnonzero(np.isin(ids_K, list(stop_ids)))
    end = int(stops[0]) + 1 if len(stops) else len(ids_K)
    return Sampled(ids_K[:end].astype(np.int64), logp_K[:end].astype(np.float32), ended=bool(len(stops)))


@contextlib.contextmanager
def only_this_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Keeps what the model's own generation config says (a repetition penalty, say) out of the distribution drawn from."""
    # peft hands the config down to the model within when it generates, and would leave it there; under virtual tokens not.
    within = [model.get_base_model()] if hasattr(model, "get_base_model") else []
    own = [(each, each.generation_config) for each in (model, *within)]
    for each, _ in own:
        each.generation_config = config
    try:
        yield
    finally:
        for each, its_own in own:
            each.generation_config = its_own
