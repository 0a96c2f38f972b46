"""What `plan` says of chance in training, from a config alone."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages import STAGES
from stages.lib.models.noise import dropped_heads, noise_problems

MIXTRAL = {
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"model_type": "gpt2", "n_head": 6}, 6),
        ({"model_type": "gpt2", "n_head": 6, "attn_pdrop": 0.0}, 0),
        ({"model_type": "bert", "num_attention_heads": 4}, 4),
        ({"model_type": "llama", "num_attention_heads": 4}, 0),
        ({"model_type": "llama", "num_attention_heads": 4, "attention_dropout": 0.1}, 4),
        (MIXTRAL, 0),
        ({**MIXTRAL, "attention_dropout": 0.1}, 4),
    ],
)
def test_heads_that_drop(config: dict[str, Any], heads: int) -> None:
    assert dropped_heads(config) == heads


def forecast(kind: str, params: dict[str, Any], **config: Any) -> Forecast:
    model = Estimate(parameters=1000, architecture={**MIXTRAL, **config}, vocabulary_size=16)
    inputs = {name: Estimate(train_rows=100) for name in STAGES[kind].inputs if name in ("chats", "preferences")}
    return Forecast(STAGES[kind].params(**params), Resources(micro_batch_size=2), {**inputs, "model": model})


FIXED = {"max_length_tokens": 8, "global_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}


def test_the_matrix_of_dropped_attention_is_counted_where_it_is_whole() -> None:
    """2 rows of 8 tokens, 2 layers, 4 heads: 2 x 8 x 8 x 4 x 2 = 1024 numbers, of 4 + 1 + 4 bytes in float32.

    Of preferences a row is two sequences, which count as one of twice the length: 2 x 16 x 16 x 4 x 2 = 4096 numbers, in
    `reward`; `dpo` trains without dropout.
    """
    for kind, bytes_more in (("sft", 1024 * 9), ("reward", 4096 * 9), ("dpo", 0)):
        with_it, without = (
            STAGES[kind].estimate(forecast(kind, FIXED, attention_dropout=rate)).memory_bytes_per_rank
            for rate in (0.1, 0.0)
        )
        assert with_it is not None and without is not None
        assert with_it - without == bytes_more, kind


def test_noise_of_routers_is_told_and_refused_where_probabilities_are_compared() -> None:
    noisy = {"router_jitter_noise": 0.1}
    assert STAGES["sft"].estimate(forecast("sft", FIXED, **noisy)).notes == (
        "router_jitter_noise is 0.1: what routers draw depends on micro_batch_size and the number of processes",
    )
    assert STAGES["sft"].estimate(forecast("sft", FIXED)).notes is None
    assert not [each for each in STAGES["sft"].check(forecast("sft", FIXED, **noisy)) if "jitter" in each.what]
    (problem,) = (each for each in STAGES["dpo"].check(forecast("dpo", FIXED, **noisy)) if "jitter" in each.what)
    assert problem.where == "inputs.model" and problem.hint == "Set router_jitter_noise to 0 in its config.json."
    assert noise_problems({**MIXTRAL, "router_jitter_noise": 0.0}) == []
