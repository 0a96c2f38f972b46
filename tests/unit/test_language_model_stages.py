"""What pretrain and sft say of a recipe before anything runs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.settings.resources import Resources
from pipeline.settings.strict import CHECKOUT
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Kind
from stages.language_model import pretrain, sft

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = {**LLAMA, "model_type": "bert"}
COMMON = {"max_steps": 10, "learning_rate": 1e-3}
TOKENS = Estimate(vocabulary_size=500, sequence_length=128, train_tokens=12_800)


def params(**changes: Any) -> pretrain.PretrainParams:
    return pretrain.PretrainParams(**{**COMMON, "global_batch_size": 8, "architecture": LLAMA, **changes})


def problems(given: pretrain.PretrainParams, **inputs: Estimate) -> list[str]:
    return [f"{p.where}: {p.what}" for p in pretrain.check(Forecast(given, Resources(), {"tokens": TOKENS, **inputs}))]


def test_a_sound_recipe() -> None:
    assert problems(params()) == []


def test_estimate_of_a_new_model() -> None:
    """500 embeddings rounded up to 512, twice: 2 x 512 x 64; layers 2 x (4 x 64 x 64 + 3 x 64 x 128 + 128); norm 64."""
    given = params(vocabulary_multiple=64, max_steps=None, epochs=2.0)
    found = pretrain.estimate(Forecast(given, Resources(micro_batch_size=2), {"tokens": TOKENS}))
    assert found.parameters == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 128) + 64
    assert found.train_rows == 100
    assert found.optimizer_steps == 25
    assert (found.micro_batch_size, found.accumulation) == (2, 4)
    assert found.vocabulary_size == 500
    assert found.architecture is not None and found.architecture["vocab_size"] == 512


def test_an_unknown_vocabulary_leaves_the_size_open() -> None:
    found = pretrain.estimate(Forecast(params(), Resources(), {"tokens": Estimate(sequence_length=128)}))
    assert found.parameters is None
    assert found.optimizer_steps == 10


def test_a_batch_in_tokens() -> None:
    given = params(global_batch_size=None, global_batch_tokens=1024)
    assert pretrain.estimate(Forecast(given, Resources(), {"tokens": TOKENS})).global_batch_size == 8
    assert problems(given) == []
    wrong = params(global_batch_size=None, global_batch_tokens=1000)
    assert problems(wrong) == ["params.global_batch_tokens: 1000 is not a multiple of the blocks' length of 128 tokens"]


def test_one_batch_size() -> None:
    for given in ({"global_batch_tokens": 1024}, {"global_batch_size": None}):
        with pytest.raises(ValueError, match="either global_batch_size or global_batch_tokens"):
            params(**given)


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="masking_probability has no effect"):
        params(masking_probability=0.15)


def test_all_that_is_wrong_with_an_architecture() -> None:
    block = {
        **LLAMA,
        "hiden_size": 8,
        "hidden_size": 66,
        "vocab_size": 400,
        "eos_token_id": 2,
        "max_position_embeddings": 100,
    }
    assert problems(params(architecture=block)) == [
        "params.architecture.eos_token_id: is taken from the tokenizer",
        "params.architecture.vocab_size: is 400, and the tokens need 500",
        "params.architecture.hiden_size: is no field of llama",
        "params.architecture.hidden_size: 66 is not a multiple of 4 attention heads",
        "params.architecture.max_position_embeddings: the blocks have 128 tokens, and the model takes 100 tokens",
    ]


def test_an_architecture_of_a_family_that_only_transformers_knows() -> None:
    assert problems(params(architecture={"model_type": "lama", "hidden_size": 64})) == [
        "params.architecture.model_type: there is no 'lama' in transformers"
    ]
    opt = {"model_type": "opt", "ffn_dim": 64, "hiden_size": 64}
    assert problems(params(architecture=opt, isolate_documents=False)) == [
        "params.architecture.hiden_size: is no field of opt"
    ]


def test_an_architecture_is_needed_and_only_one() -> None:
    assert problems(params(architecture=None)) == [
        "params.architecture: is required where the stage has no input model"
    ]
    assert problems(params(), model=Estimate()) == [
        "params.architecture: has no effect where the stage has an input model"
    ]
    assert problems(params(architecture={"hidden_size": 8})) == ["params.architecture.model_type: is required"]


def test_a_model_with_another_vocabulary() -> None:
    assert problems(params(architecture=None), model=Estimate(vocabulary_size=600)) == [
        "inputs.model: has a vocabulary of 600, and the tokens one of 500"
    ]


def test_an_architecture_for_the_other_objective() -> None:
    assert len(problems(params(architecture=BERT))) == 1
    assert len(problems(params(objective="masked"))) == 1
    assert problems(params(architecture=BERT, objective="masked")) == []


def test_the_kind_of_the_artifact() -> None:
    stage = pretrain.STAGE
    assert stage.output_kind(params(), {"tokens": Kind.TOKENS}) is Kind.CAUSAL_LM
    assert stage.output_kind(params(objective="masked"), {"tokens": Kind.TOKENS}) is Kind.ENCODER
    with pytest.raises(RecipeError, match="is causal, and the input model is of the kind encoder"):
        stage.output_kind(params(), {"model": Kind.ENCODER})


def test_sft_checks_length_and_batch() -> None:
    given = sft.SftParams(**COMMON, global_batch_size=7, max_length_tokens=256)
    model = Estimate(architecture={**LLAMA, "vocab_size": 500, "max_position_embeddings": 128})
    found = sft.check(Forecast(given, Resources(processes=2), {"model": model}))
    assert [problem.where for problem in found] == ["params.global_batch_size", "params.max_length_tokens"]


def test_sft_estimate() -> None:
    given = sft.SftParams(global_batch_size=4, epochs=2.0, learning_rate=1e-4, max_length_tokens=64)
    chats = Estimate(train_rows=10)
    found = sft.estimate(Forecast(given, Resources(), {"model": Estimate(parameters=1000), "chats": chats}))
    assert (found.optimizer_steps, found.parameters, found.sequence_length) == (5, 1000, 64)


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys; from stages.language_model import pretrain, sft;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"
