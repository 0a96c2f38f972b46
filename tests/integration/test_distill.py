"""The distill stage: a small student of a tiny teacher that was trained for seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ArtifactError, RecipeError
from pipeline.settings.resources import Resources
from pipeline.stage import Context, Estimate, Forecast, Result
from pipeline.store.artifact import digest_file
from stages.compression.distill import STAGE, DistillParams, distillation_metrics
from stages.language_model import pretrain
from stages.lib.formulas.distillation_losses import measure_distillation
from stages.lib.formulas.token_losses import TARGETS, logits_of
from stages.lib.measuring.perplexity import document_pieces, score
from stages.lib.text.blocks import Blocks, collate_causal
from stages.lib.text.packed import PackedTokens
from tests.integration.preference_world import make_model, run, run_in_processes
from tests.integration.tiny_language_model import TinyWorld, make_tokenizer, make_world

pytestmark = pytest.mark.slow

STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TRAINING: dict[str, Any] = {"global_batch_size": 8, "learning_rate": 5e-3, "warmup_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"), steps=60)


def inputs(world: TinyWorld) -> dict[str, Path]:
    return {"teacher": world.model, "tokens": world.tokens}


@pytest.fixture(scope="module")
def distilled(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Context]:
    params = {**TRAINING, "architecture": STUDENT, "max_steps": 60}
    return run(STAGE, inputs(world), params, tmp_path_factory.mktemp("distill"))


def test_the_student_comes_nearer_to_the_teacher(distilled: tuple[Result, Context]) -> None:
    metrics = distilled[0].metrics
    assert metrics["heldout_perplexity"] < 0.5 * metrics["heldout_perplexity_untrained"]
    assert metrics["heldout_kl"] < 0.5 * metrics["heldout_kl_untrained"]
    assert metrics["heldout_agreement"] > 2 * metrics["heldout_agreement_untrained"]


def test_metrics_agree_with_each_other(distilled: tuple[Result, Context], world: TinyWorld) -> None:
    result, context = distilled
    metrics = result.metrics
    ratio = metrics["heldout_perplexity"] / metrics["heldout_perplexity_teacher"]
    assert metrics["heldout_perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert metrics["heldout_perplexity"] == pytest.approx(math.exp(metrics["heldout_loss"]), rel=1e-12)
    teacher = AutoModelForCausalLM.from_pretrained(world.model)
    student = AutoModelForCausalLM.from_pretrained(context.out)
    assert result.facts.parameters == student.num_parameters()
    assert metrics["parameters_fraction"] == student.num_parameters() / teacher.num_parameters() < 0.5


def test_perplexities_are_those_of_the_models_on_disk(distilled: tuple[Result, Context], world: TinyWorld) -> None:
    """Measured another way: each document's part of a block by itself, instead of behind borders within the block."""
    pieces = document_pieces(PackedTokens(world.tokens, "heldout"))
    for folder, name in ((distilled[1].out, "heldout_perplexity"), (world.model, "heldout_perplexity_teacher")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert score(model, pieces, 16).perplexity == pytest.approx(distilled[0].metrics[name], rel=1e-4)


def test_the_divergence_is_that_of_the_models_on_disk(distilled: tuple[Result, Context], world: TinyWorld) -> None:
    # Without a cache, as in training: with one transformers does not look for borders in the positions.
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, use_cache=False).eval()
        for folder in (world.model, distilled[1].out)
    )
    blocks = Blocks(PackedTokens(world.tokens, "heldout"))
    batch = collate_causal(isolate=True)([blocks[index] for index in range(len(blocks))])
    with torch.no_grad():
        sums = measure_distillation(logits_of(student, batch), logits_of(teacher, batch), batch[TARGETS])
    found = distillation_metrics({name: float(value) for name, value in sums.items()})
    for name in ("heldout_kl", "heldout_agreement", "heldout_token_accuracy", "heldout_token_accuracy_teacher"):
        assert distilled[0].metrics[name] == pytest.approx(found[name], rel=1e-4), name


def test_the_artifact_is_a_model_with_its_tokenizer(distilled: tuple[Result, Context], world: TinyWorld) -> None:
    result, context = distilled
    tokenizer = AutoTokenizer.from_pretrained(context.out)
    assert (context.out / "tokenizer.json").read_bytes() == (world.tokens / "tokenizer" / "tokenizer.json").read_bytes()
    config = json.loads((context.out / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == result.facts.vocabulary_size
    assert result.facts.tokenizer_digest == PackedTokens(world.tokens).info.tokenizer_digest


def test_without_the_teacher_it_is_plain_training(world: TinyWorld, tmp_path: Path) -> None:
    """alpha 0 is the pretrain stage: the same start, the same blocks in the same order, the same loss, the same weights."""
    params = {**TRAINING, "architecture": STUDENT, "max_steps": 5}
    alone, plain = run(pretrain.STAGE, {"tokens": world.tokens}, params, tmp_path / "pretrain")
    result, context = run(STAGE, inputs(world), {**params, "alpha": 0.0}, tmp_path / "distill")
    losses = [[event["loss"] for event in each.journal.events("step")] for each in (plain, context)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert result.metrics["heldout_perplexity_untrained"] == pytest.approx(
        alone.metrics["heldout_perplexity_untrained"], rel=1e-6
    )
    assert result.metrics["heldout_perplexity"] == pytest.approx(alone.metrics["heldout_perplexity"], rel=1e-4)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(world: TinyWorld, tmp_path: Path) -> None:
    """KL(p || p) = 0 and its gradient too: with alpha 1 the loss starts at 0, and a step of 1e-9 changes no measure."""
    params = {"global_batch_size": 8, "learning_rate": 1e-9, "max_steps": 1, "alpha": 1.0, "temperature": 2.0}
    result, context = run(STAGE, {**inputs(world), "student": world.model}, params, tmp_path)
    assert next(context.journal.events("step"))["loss"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["heldout_kl_base"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["heldout_agreement_base"] == 1.0
    assert result.metrics["heldout_perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert result.metrics["parameters_fraction"] == 1.0
    start, end = (load_file(folder / "model.safetensors") for folder in (world.model, context.out))
    assert all(torch.allclose(start[name], end[name], atol=1e-7) for name in start)


def test_the_teacher_is_not_changed(distilled: tuple[Result, Context], world: TinyWorld, tmp_path: Path) -> None:
    before = digest_file(world.model / "model.safetensors")
    run(STAGE, inputs(world), {**TRAINING, "architecture": STUDENT, "max_steps": 3}, tmp_path)
    assert digest_file(world.model / "model.safetensors") == before


def test_a_teacher_with_another_tokenizer_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", make_tokenizer(["other words"], 300))
    params = {**TRAINING, "architecture": STUDENT, "max_steps": 3}
    with pytest.raises(ArtifactError, match=r"inputs\.teacher"):
        run(STAGE, {"teacher": other, "tokens": world.tokens}, params, tmp_path / "run")


def test_a_field_that_the_architecture_does_not_have_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    params = {**TRAINING, "architecture": {**STUDENT, "hiden_size": 32}, "max_steps": 3}
    with pytest.raises(RecipeError, match=r"hiden_size.*Did you mean 'hidden_size'"):
        run(STAGE, inputs(world), params, tmp_path)


def test_a_parameter_that_would_be_ignored_is_refused() -> None:
    DistillParams(**TRAINING, architecture=STUDENT, max_steps=9, alpha=0.1, temperature=2.0)
    with pytest.raises(ValidationError, match="temperature has no effect with alpha 0"):
        DistillParams(**TRAINING, architecture=STUDENT, max_steps=9, alpha=0.0, temperature=2.0)


def forecast(architecture: dict[str, Any] | None, **known: Estimate) -> Forecast:
    params = DistillParams(**TRAINING, architecture=architecture, max_steps=9)
    tokens = Estimate(vocabulary_size=1024, sequence_length=64, train_tokens=64_000)
    return Forecast(params, Resources(device="cpu"), {"tokens": tokens, **known})


def test_the_plan_counts_student_and_teacher() -> None:
    """The student: 1024 x 32 embeddings, tied; one layer of 4 x 32 x 32 attention, 3 x 32 x 64 mlp, 2 x 32 norms; 32.

    A teacher of a thousand million parameters more takes 4 bytes of memory for each.
    """
    parameters = 1024 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 + 32
    small, large = (
        STAGE.estimate(forecast(STUDENT, teacher=Estimate(parameters=size, vocabulary_size=1024)))
        for size in (10**6, 10**6 + 10**9)
    )
    assert small.parameters == large.parameters == parameters
    assert small.memory_bytes_per_rank is not None and large.memory_bytes_per_rank is not None
    assert large.memory_bytes_per_rank - small.memory_bytes_per_rank == 4 * 10**9
    assert (small.train_rows, small.optimizer_steps) == (1000, 9)


def test_the_plan_finds_what_does_not_fit() -> None:
    fitting = Estimate(vocabulary_size=1024)
    other = Estimate(vocabulary_size=4096)
    bert = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}
    cases = {
        "fits": (forecast(STUDENT, teacher=fitting), []),
        "another vocabulary": (forecast(STUDENT, teacher=other), ["inputs.teacher"]),
        "no student": (forecast(None, teacher=fitting), ["params.architecture"]),
        "two students": (forecast(STUDENT, teacher=fitting, student=fitting), ["params.architecture"]),
        "student's vocabulary": (forecast(None, teacher=fitting, student=other), ["inputs.student"]),
        "no causal model": (forecast(bert, teacher=fitting), ["params.architecture.model_type"]),
        "too short": (
            forecast({**STUDENT, "max_position_embeddings": 32}, teacher=fitting),
            ["params.architecture.max_position_embeddings"],
        ),
    }
    for name, (case, expected) in cases.items():
        assert [problem.where for problem in STAGE.check(case)] == expected, name


def test_two_processes_under_zero3_train_what_one_trains(world: TinyWorld, tmp_path: Path) -> None:
    """The teacher is whole in each process while ZeRO-3 splits the student."""
    params = {**TRAINING, "architecture": STUDENT, "max_steps": 4, "learning_rate": 1e-3, "temperature": 2.0}
    alone, context = run(STAGE, inputs(world), params, tmp_path / "alone")
    together = run_in_processes("distill", inputs(world), params, tmp_path / "together", 2, "zero3")
    assert together["losses"] == pytest.approx([event["loss"] for event in context.journal.events("step")], rel=1e-5)
    assert set(together["metrics"]) == set(alone.metrics)
    for name, value in alone.metrics.items():
        assert together["metrics"][name] == pytest.approx(value, rel=1e-3), name
