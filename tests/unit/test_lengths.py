"""How many tokens a model takes, and that every stage asks the same question of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages import STAGES
from stages.lib.models.lengths import first_position, length_problems, longest_text, require_length

LLAMA = {"model_type": "llama", "max_position_embeddings": 128}
ROBERTA = {"model_type": "roberta", "max_position_embeddings": 130, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "limit", "first"),
    [
        (LLAMA, 128, 0),
        ({"model_type": "gpt2", "n_positions": 128}, 128, 0),
        ({"model_type": "gemma3", "text_config": {**LLAMA, "pad_token_id": 7}}, 128, 0),
        (ROBERTA, 128, 2),
        ({**ROBERTA, "pad_token_id": None}, 128, 2),
        ({**ROBERTA, "pad_token_id": 0}, 129, 1),
        ({"model_type": "some-model", "text_config": ROBERTA}, 128, 2),
        ({"model_type": "rwkv"}, None, 0),
    ],
)
def test_the_longest_text(config: dict[str, Any], limit: int | None, first: int) -> None:
    """RoBERTa numbers positions from behind the padding id: with the id 1 the first is 2, and of 130 positions 128 serve."""
    assert longest_text(config) == limit
    assert first_position(config) == first


def test_a_length_that_fits_is_no_problem() -> None:
    assert length_problems(LLAMA, 128) == []
    assert length_problems(LLAMA, None) == []
    assert length_problems({"model_type": "rwkv"}, 10**9) == []
    require_length(LLAMA, 128)


def test_one_too_long_is_one_problem_that_says_all_numbers() -> None:
    (plain,) = length_problems(ROBERTA, 130)
    assert str(plain) == "params.max_length_tokens: is 130, and the model takes 128 tokens. Lower it to 128."
    said = {"where": "inputs.tokens", "what": "its blocks have {tokens}", "hint": "Drop {above} of {tokens}."}
    with pytest.raises(DataError) as caught:
        require_length(ROBERTA, 131, **said)
    (other,) = caught.value.problems
    assert str(other) == "inputs.tokens: its blocks have 131, and the model takes 128 tokens. Drop 3 of 131."


TRAINING = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 1}
ON_POLICY = {
    "rewards": [{"kind": "length_penalty", "target_tokens": 2, "per_token": 0.1}],
    "rollouts": 1,
    "rollout_batch_size": 8,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "max_prompt_tokens": 100,
}
ASKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("model", "max_length_tokens", TRAINING),
    "reward": ("model", "max_length_tokens", TRAINING),
    "dpo": ("model", "max_length_tokens", TRAINING),
    "kto": ("model", "max_length_tokens", TRAINING),
    "reference_logprobs": ("model", "max_length_tokens", {}),
    "classify": ("encoder", "max_length_tokens", TRAINING),
    "extract": ("encoder", "max_length_tokens", {**TRAINING, "stride_tokens": 4}),
    "answer": ("encoder", "max_length_tokens", {**TRAINING, "stride_tokens": 4}),
    "pack": ("tokenizer", "sequence_length", {}),
}
"""Stage -> the input whose model is asked, the param that says how long texts are, and the other params."""


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "gpt2", "n_positions": 128}, ROBERTA], ids=str)
@pytest.mark.parametrize("kind", ASKED)
def test_plan_refuses_what_is_longer_than_the_model(kind: str, config: dict[str, Any]) -> None:
    """Each of the models takes 128 tokens."""
    role, field, params = ASKED[kind]
    stage = STAGES[kind]
    for length, expected in ((128, []), (129, [f"params.{field}: is 129, and the model takes 128 tokens."])):
        forecast = Forecast(
            stage.params(**params, **{field: length}), Resources(), {role: Estimate(architecture=config)}
        )
        found = [str(problem) for problem in stage.check(forecast) if "takes" in str(problem)]
        assert found == [f"{each} Lower it to 128." for each in expected]


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "reinforce_plus_plus", "online_dpo"])
def test_plan_refuses_completions_beyond_the_model(kind: str) -> None:
    stage = STAGES[kind]
    for new, expected in ((28, []), (29, ["100 and max_new_tokens 29 are 129, and the model takes 128 tokens"])):
        forecast = Forecast(
            stage.params(**ON_POLICY, max_new_tokens=new), Resources(), {"model": Estimate(architecture=LLAMA)}
        )
        found = [problem.what for problem in stage.check(forecast) if "takes" in problem.what]
        assert found == expected


def test_a_compared_model_says_how_much_it_reads_under_any_name(tmp_path: Path) -> None:
    """GPT-2's config calls its positions `n_positions`: to overlook that would let it run beyond them."""
    from stages.lib.measuring.compared_models import Subject
    from tests.distributed.training_world import GPT2_WITH_DROPOUT, make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2_WITH_DROPOUT))
    assert Subject.open("gpt2", tmp_path).length() == 128
