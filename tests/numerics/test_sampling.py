"""Draws from a distribution worked out by hand, and completions that depend on nothing but prompt and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from stages.lib.generating.sampling import DrawByUniforms, Sampled, cut, sample, uniforms_for
from tests.numerics.tiny_models import FAMILIES, PADDING, VOCABULARY, logprobs_alone, tiny_policy

# Log-probabilities 1/2, 0, 1/4, 1/8, 1/8: the cumulative distribution steps at 1/2, 3/4 and 7/8.
LOGITS_V = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125]).log()


def draw(uniforms: Sequence[float], logits_V: torch.Tensor = LOGITS_V, temperature: float = 1.0) -> list[int]:
    """The token that each number draws."""
    drawing = DrawByUniforms(np.array(uniforms).reshape(-1, 1), prompt_length=2, temperature=temperature)
    chosen_BV = drawing(torch.zeros(len(uniforms), 2).long(), logits_V.expand(len(uniforms), -1))
    assert (chosen_BV.isfinite().sum(-1) == 1).all(), "a single token is left to choose"
    return chosen_BV.argmax(-1).tolist()


def test_draws_around_every_boundary() -> None:
    """A number below 1/2 draws token 0, one from there to 3/4 token 2, to 7/8 token 3, and to 1 token 4."""
    little = 1e-6
    numbers = [
        0.0,
        0.5 - little,
        0.5 + little,
        0.75 - little,
        0.75 + little,
        0.875 - little,
        0.875 + little,
        1 - little,
    ]
    assert draw(numbers) == [0, 0, 2, 2, 3, 3, 4, 4]


def test_tokens_without_probability_are_never_drawn() -> None:
    """Not even by 0, by a number on a step, or by the greatest one below 1, where they stand first, between, or last."""
    nothing = -torch.inf
    logits_V = torch.tensor([nothing, 0.0, nothing, nothing, 0.0, nothing])
    assert draw([0.0, 0.25, 0.5, 0.75, np.nextafter(1.0, 0.0)], logits_V) == [1, 1, 4, 4, 4]


def test_shares_of_draws_are_the_probabilities() -> None:
    """1024 numbers in the middles of equal parts of [0, 1): token i is drawn 1024 p_i times, exactly.

    At temperature 1/2 the weights are squared, (16, 0, 4, 1, 1) / 22, and a token's number of middles is its share of them
    to less than one.
    """
    numbers = (np.arange(1024) + 0.5) / 1024
    assert np.bincount(draw(numbers.tolist()), minlength=5).tolist() == [512, 0, 256, 128, 128]
    counts = np.bincount(draw(numbers.tolist(), temperature=0.5), minlength=5)
    assert np.abs(counts - 1024 * np.array([16, 0, 4, 1, 1]) / 22).max() < 1


def test_very_unlikely_tokens_keep_their_share() -> None:
    """64 tokens of 2^-26 behind one of 1 - 2^-20: the middles of their parts of [0, 1) draw one after the other.

    In single precision, whose steps below 1 are 2^-24, a cumulative distribution would skip three of four.
    """
    weights_V = torch.full((65,), 2.0**-26, dtype=torch.float64)
    weights_V[0] = 1 - 2.0**-20
    numbers = 1 - 2.0**-20 + (np.arange(64) + 0.5) * 2.0**-26
    assert draw(numbers.tolist(), weights_V.log().float()) == list(range(1, 65))


def test_temperature_zero_takes_the_likeliest_token() -> None:
    """Whatever the number, and with its log-probability at temperature 1: log(1/2)."""
    assert draw([0.0, 0.6, 0.99], temperature=0.0) == [0, 0, 0]
    drawing = DrawByUniforms(np.array([[0.99]]), prompt_length=1, temperature=0.0)
    drawing(torch.zeros(1, 1).long(), LOGITS_V.unsqueeze(0))
    assert drawing.logprobs[0].tolist() == pytest.approx([np.log(0.5)], abs=1e-6)


def test_each_row_and_place_has_its_own_number() -> None:
    """Rows (0.1, 0.8) and (0.9, 0.6), behind a prompt of three tokens: first 0 and 4, then 3 and 2."""
    drawing = DrawByUniforms(np.array([[0.1, 0.8], [0.9, 0.6]]), prompt_length=3, temperature=1.0)
    for place, tokens in enumerate([[0, 4], [3, 2]]):
        chosen_BV = drawing(torch.zeros(2, 3 + place).long(), LOGITS_V.expand(2, -1))
        assert chosen_BV.argmax(-1).tolist() == tokens
        assert drawing.logprobs[place].tolist() == pytest.approx(LOGITS_V[tokens].tolist(), abs=1e-6)


def test_numbers_are_a_function_of_seed_and_position() -> None:
    numbers = uniforms_for(5, 6, 8)
    assert (uniforms_for(5, 6, 8) == numbers).all()
    assert ((numbers >= 0) & (numbers < 1)).all()
    for seed, position in ((5, 7), (6, 6), (6, 5), (56, 8), (0, 0)):
        assert not np.isin(uniforms_for(seed, position, 8), numbers).any()
    # A longer limit does not draw the beginning anew.
    assert (uniforms_for(5, 6, 20)[:8] == numbers).all()


def test_a_completion_is_cut_behind_its_first_stop() -> None:
    """The stop id is part of it; what `generate` pads with is not, nor is a second stop id."""
    logprobs = np.arange(5, dtype=np.float32)
    ended = cut(np.array([9, 8, 7, 6, 8]), logprobs, stop_ids=[6, 8])
    assert (ended.ids.tolist(), ended.logprobs.tolist(), ended.ended) == ([9, 8], [0, 1], True)
    whole = cut(np.array([9, 9, 7, 9, 9]), logprobs, stop_ids=[6, 8])
    assert (whole.ids.tolist(), whole.logprobs.tolist(), whole.ended) == ([9, 9, 7, 9, 9], [0, 1, 2, 3, 4], False)


# Completions of a model.

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [PADDING, 15], [20, 21, 22, 23], [30]]
"""The third one begins with the padding id, which counts there."""
STOP_IDS = [2, 17, 31]
NUM_NEW = 10
SEED = 3


def completed(
    model: Any,
    positions: Sequence[int] = range(len(PROMPTS)),
    *,
    stop_ids: Sequence[int] = STOP_IDS,
    temperature: float = 1.0,
    num_new: int = NUM_NEW,
) -> list[Sampled]:
    """A completion of the prompts at these positions, together in one batch."""
    uniforms_BK = np.stack([uniforms_for(SEED, position, num_new) for position in positions])
    prompts = [PROMPTS[position] for position in positions]
    return sample(model, prompts, uniforms_BK, stop_ids=stop_ids, temperature=temperature)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_does_not_depend_on_its_neighbours(family: str) -> None:
    """Alone, beside longer and shorter prompts, and in another order: the same tokens, the same log-probabilities."""
    model = tiny_policy(family)
    together = completed(model)
    assert len({tuple(each.ids) for each in together}) == len(PROMPTS)
    assert {each.ended for each in together} == {True, False}
    for positions in ([0], [1], [2], [3], [4], [4, 1], [3, 2, 1, 0]):
        for position, each in zip(positions, completed(model, positions), strict=True):
            assert each.ids.tolist() == together[position].ids.tolist()
            assert each.ended == together[position].ended
            np.testing.assert_allclose(each.logprobs, together[position].logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probabilities_are_those_of_a_forward_pass(family: str, temperature: float) -> None:
    """Over prompt and completion at once, without a cache and without padding."""
    model = tiny_policy(family)
    for prompt, each in zip(PROMPTS, completed(model, temperature=temperature), strict=True):
        assert len(each.logprobs) == len(each.ids)
        expected_K = logprobs_alone(model, prompt, each.ids.tolist(), temperature)
        np.testing.assert_allclose(each.logprobs, expected_K.numpy(), rtol=0, atol=1e-5)


def test_each_token_is_the_one_that_its_number_draws() -> None:
    """By the cumulative distribution of a forward pass over everything before it."""
    model = tiny_policy("llama")
    for position, each in enumerate(completed(model)):
        whole_1T = torch.tensor([[*PROMPTS[position], *each.ids.tolist()]])
        with torch.no_grad():
            logits_KV = model(input_ids=whole_1T).logits[0, len(PROMPTS[position]) - 1 : -1].double()
        cumulative_KV = logits_KV.softmax(-1).cumsum(-1).numpy()
        numbers = uniforms_for(SEED, position, NUM_NEW)
        drawn = [int(np.sum(row <= number)) for row, number in zip(cumulative_KV, numbers, strict=False)]
        assert drawn == each.ids.tolist()


def test_stops_end_a_completion_and_change_nothing_before() -> None:
    """Without stops ten tokens are written. With them those up to the first stop id are, and it with them."""
    model = tiny_policy("llama")
    free = completed(model, stop_ids=[])
    assert [len(each.ids) for each in free] == [NUM_NEW] * len(PROMPTS)
    assert not any(each.ended for each in free)
    for whole, each in zip(free, completed(model), strict=True):
        stops = [place for place, token in enumerate(whole.ids.tolist()) if token in STOP_IDS]
        assert each.ended == bool(stops)
        length = stops[0] + 1 if stops else NUM_NEW
        assert each.ids.tolist() == whole.ids.tolist()[:length]
        assert len(each.logprobs) == length


def test_a_lower_limit_cuts_a_completion_and_changes_nothing_before() -> None:
    model = tiny_policy("llama")
    for longer, each in zip(completed(model), completed(model, num_new=3), strict=True):
        assert each.ids.tolist() == longer.ids.tolist()[:3]
        assert each.ended == (longer.ended and len(longer.ids) <= 3)


def test_temperature_zero_is_greedy_decoding() -> None:
    """By `generate` of transformers, one prompt after the other."""
    model = tiny_policy("llama")
    greedy = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=STOP_IDS, pad_token_id=PADDING)
    for prompt, each in zip(PROMPTS, completed(model, temperature=0.0), strict=True):
        ids_1T = torch.tensor([prompt])
        theirs = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=greedy)
        assert each.ids.tolist() == theirs[0, len(prompt) :].tolist()


HABITS: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "top_k": 2,
    "top_p": 0.5,
    "temperature": 0.1,
    "do_sample": True,
    "min_new_tokens": 9,
    "suppress_tokens": list(range(20)),
    "eos_token_id": 25,
    "max_length": 9,
}
"""What a model may say in its generation config, all of which would change the distribution or the lengths."""


def test_the_models_own_generation_config_changes_nothing() -> None:
    """And is its own again afterwards, also where sampling fails."""
    model = tiny_policy("llama")
    expected = completed(model)
    habits = GenerationConfig(**HABITS)
    model.generation_config = habits
    for each, plain in zip(completed(model), expected, strict=True):
        assert each.ids.tolist() == plain.ids.tolist()
        assert each.logprobs.tolist() == plain.logprobs.tolist()
    assert model.generation_config is habits
    with pytest.raises(IndexError):
        sample(model, [[VOCABULARY]], np.zeros((1, 2)), stop_ids=[1], temperature=1.0)
    assert model.generation_config is habits
    assert habits.to_diff_dict() == GenerationConfig(**HABITS).to_diff_dict()


def test_the_same_under_a_fresh_adapter() -> None:
    """It adds 0 to the weights. peft hands a generation config down to the model within: that one has its own again too."""
    from stages.lib.models.adapters.attaching import attach
    from stages.lib.models.adapters.params import LoraMethod

    base = tiny_policy("llama")
    expected = completed(base)
    habits = GenerationConfig(**HABITS)
    base.generation_config = habits
    model = attach(base, LoraMethod(method="lora", rank=4), 0)
    for each, plain in zip(completed(model), expected, strict=True):
        assert each.ids.tolist() == plain.ids.tolist()
    assert model.generation_config is habits
    assert model.get_base_model().generation_config is habits


def test_what_pads_shorter_prompts_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.lib.generating import sampling

    model = tiny_policy("llama")
    expected = completed(model)
    monkeypatch.setattr(sampling, "PADDING_ID", PADDING)
    assert sampling.PADDING_ID != 0
    for each, other in zip(completed(model), expected, strict=True):
        assert each.ids.tolist() == other.ids.tolist()
        assert each.logprobs.tolist() == other.logprobs.tolist()


def test_the_nucleus_leaves_the_likeliest_tokens_with_their_shares() -> None:
    """Of 1/2, 1/4, 1/8, 1/8 the first two hold 0.75: with top_p 0.7 token 0 is drawn below 2/3, and token 2 from there on."""
    numbers = [0.0, 2 / 3 - 1e-6, 2 / 3 + 1e-6, 1 - 1e-6]
    drawing = DrawByUniforms(np.array(numbers).reshape(-1, 1), prompt_length=2, temperature=1.0, top_p=0.7)
    chosen_BV = drawing(torch.zeros(4, 2).long(), LOGITS_V.expand(4, -1))
    assert chosen_BV.argmax(-1).tolist() == [0, 0, 2, 2]
    assert drawing.logprobs[0].exp().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])


def test_tokens_are_told_as_they_come() -> None:
    """Those of the completion, the one that ends it included, and none of the prompt."""
    model = tiny_policy("llama")
    for position, whole in enumerate(completed(model)):
        told: list[int] = []
        numbers_1K = uniforms_for(SEED, position, NUM_NEW)[None]
        options: dict[str, Any] = {"stop_ids": STOP_IDS, "temperature": 1.0, "on_token": told.append}
        sample(model, [PROMPTS[position]], numbers_1K, **options)
        assert told == whole.ids.tolist()


def test_all_that_write_completions_are_asked_in_one_way() -> None:
    from inspect import signature

    from stages.lib.generating.generator import Sampler
    from stages.lib.generating.transformers import TransformersSampler
    from stages.lib.generating.vllm import VllmEngine

    asked = signature(Sampler.sample)
    assert signature(TransformersSampler.sample) == signature(VllmEngine.sample) == asked
