from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages.encoder.classify import STAGE, ClassifyParams
from tests.integration.tiny_encoder import (
    losses,
    request_encoder,
    request_rows,
    require_exact_resume,
    run_task,
    write_data,
)

pytestmark = pytest.mark.slow

PARAMS = {"global_batch_size": 32, "max_steps": 60, "learning_rate": 2e-3, "warmup_steps": 10, "max_length_tokens": 48}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "modernbert", "modernbert")


def test_learns_intents_and_publishes_a_classifier_that_opens_as_one(encoder: Path, tmp_path: Path) -> None:
    rows = request_rows()
    unseen = {"text": "is it raining ?", "label": "Chat"}
    long = {**rows[0], "text": f"{rows[0]['text']} please" * 20}
    data = write_data(tmp_path / "labels", rows[:2000], [*rows[-199:], unseen, long])
    result, out = run_task(STAGE, {"encoder": encoder, "labels": data}, PARAMS, tmp_path / "run")

    metrics = result.metrics
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] / 2
    assert metrics["heldout_accuracy"] > 2 * metrics["heldout_accuracy_majority"]
    assert metrics["heldout_macro_f1"] > 0.5
    # One row of 201 has a label that drawing evenly from the seven known ones cannot hit.
    assert metrics["heldout_accuracy_random"] == pytest.approx(200 / 201 / 7)
    assert metrics["heldout_rows_with_unseen_label"] == 1
    assert (metrics["train_rows_truncated"], metrics["heldout_rows_truncated"]) == (0, 1)

    labels = sorted({row["label"] for row in rows})
    assert result.facts.labels == labels
    assert result.facts.head_type == "sequence_classification"
    # As anyone would use it: the published tokenizer adds what training saw.
    model, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.id2label == dict(enumerate(labels))
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [row["text"] for row in rows[-199:]]
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
    right = sum(
        model.config.id2label[int(label)] == row["label"]
        for label, row in zip(logits.argmax(-1), rows[-199:], strict=True)
    )
    # Both other rows of the 201 count too: the one with the unseen label is wrong, the long one may be right.
    assert round(metrics["heldout_accuracy"] * 201) - right in (0, 1)


def test_resumes_exactly(encoder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "labels", request_rows()[:40], request_rows()[-10:])
    require_exact_resume(STAGE, {"encoder": encoder, "labels": data}, {"max_length_tokens": 48}, tmp_path)


def test_refuses_one_label_and_a_length_that_the_encoder_does_not_take(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}] * 8
    data = write_data(tmp_path / "labels", rows, rows)
    with pytest.raises(DataError, match="training rows: have no label but 'x'"):
        run_task(STAGE, {"encoder": encoder, "labels": data}, PARAMS, tmp_path / "one")
    with pytest.raises(DataError, match=r"params\.max_length_tokens: is 97, and the model takes 96 tokens"):
        run_task(STAGE, {"encoder": encoder, "labels": data}, {**PARAMS, "max_length_tokens": 97}, tmp_path / "long")


def test_refuses_an_encoder_with_holes(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in encoder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.Wi.weight"))
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    data = write_data(tmp_path / "labels", request_rows()[:16], request_rows()[-8:])
    with pytest.raises(ArtifactError, match=f"does not hold the weights {name}"):
        run_task(STAGE, {"encoder": broken, "labels": data}, PARAMS, tmp_path / "run")


def test_plan_knows_the_steps_and_that_texts_are_too_long() -> None:
    """2.5 passes over 100 rows in batches of 32: 250 / 32 = 7.8, so 8 steps."""
    params = ClassifyParams(global_batch_size=32, epochs=2.5, learning_rate=1e-3, max_length_tokens=200)
    architecture = {"model_type": "roberta", "max_position_embeddings": 130, "pad_token_id": 1}
    inputs = {"encoder": Estimate(parameters=7, architecture=architecture), "labels": Estimate(train_rows=100)}
    forecast = Forecast(params, Resources(processes=3), inputs)
    estimate = STAGE.estimate(forecast)
    assert (estimate.optimizer_steps, estimate.train_rows, estimate.parameters) == (8, 100, 7)
    problems = STAGE.check(forecast)
    assert [problem.where for problem in problems] == ["params.global_batch_size", "params.max_length_tokens"]
    # RoBERTa's positions begin after the padding id: 130 - 2.
    assert problems[1] == Problem(
        "params.max_length_tokens",
        "is 200, and the model takes 128 tokens",
        "Lower it to 128.",
    )
