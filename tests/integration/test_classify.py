from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.settings.resources import Resources
from pipeline.stage import Estimate, Forecast
from stages.encoder.classify import STAGE, ClassifyParams
from stages.lib.encoding.classification import encode_row_of_texts
from stages.lib.encoding.figures import FIGURES
from stages.lib.text.frames import require_frame
from tests.integration.tiny_encoder import (
    losses,
    request_encoder,
    request_rows,
    require_exact_resume,
    run_task,
    write_data,
)
from tests.integration.tiny_language_model import make_tokenizer

pytestmark = pytest.mark.slow

PARAMS = {"global_batch_size": 32, "max_steps": 60, "learning_rate": 2e-3, "warmup_steps": 10, "max_length_tokens": 48}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "modernbert", "modernbert")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert")


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

    figures = json.loads((out / FIGURES).read_bytes())
    assert_figures_add_up(figures, metrics, 201)
    assert figures["confusion_matrix"]["Chat"].keys() <= set(labels)
    assert figures["per_label"]["Chat"]["recall"] == 0
    assert metrics["heldout_accuracy_bag_of_words"] > 0.9, "intents are told by their words"
    assert list(figures["per_source"]) == [""] and figures["per_length_tokens"]["65-128"]["rows"] == 1


def assert_figures_add_up(figures: dict, metrics: dict, num_rows: int) -> None:
    """The confusion matrix's diagonal is the accuracy, its sums are what was wanted and found; groups hold all rows."""
    matrix = figures["confusion_matrix"]
    diagonal = sum(row.get(label, 0) for label, row in matrix.items())
    assert figures["rows"] == num_rows == sum(sum(row.values()) for row in matrix.values())
    assert diagonal / num_rows == pytest.approx(metrics["heldout_accuracy"])
    for label, of_label in figures["per_label"].items():
        assert of_label["wanted"] == sum(matrix.get(label, {}).values())
        assert of_label["found"] == sum(row.get(label, 0) for row in matrix.values())
        assert of_label["right"] == matrix.get(label, {}).get(label, 0)
    f1 = [of_label["f1"] for of_label in figures["per_label"].values()]
    assert sum(f1) / len(f1) == pytest.approx(metrics["heldout_macro_f1"])
    for name in ("per_source", "per_length_tokens"):
        groups = figures[name].values()
        assert sum(group["rows"] for group in groups) == num_rows
        assert sum(group["rows"] * group["accuracy"] for group in groups) == pytest.approx(diagonal)


def pairs(rows: list[dict], shift: int = 1) -> list[dict]:
    """Each request beside the next one, whose intent is the label: the first text says nothing of it."""
    others = rows[shift:] + rows[:shift]
    return [
        {"text": row["text"], "text_pair": other["text"], "label": other["label"], "source": "ab"[number % 2]}
        for number, (row, other) in enumerate(zip(rows, others, strict=True))
    ]


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_learns_from_pairs_what_plain_transformers_gives_the_same_scores(
    encoder: Path, bert: Path, tmp_path: Path, architecture: str
) -> None:
    rows = request_rows()
    heldout = pairs(rows[-120:])
    long = {**heldout[0], "text": f"{rows[0]['text']} please " * 30}
    data = write_data(tmp_path / "labels", pairs(rows[:3000]), [*heldout, long])
    inputs = {"encoder": bert if architecture == "bert" else encoder, "labels": data}
    params = {**PARAMS, "max_steps": 120, "max_length_tokens": 64}
    result, out = run_task(STAGE, inputs, params, tmp_path / "run")
    metrics = result.metrics
    assert result.facts.takes_pairs is True
    assert metrics["heldout_accuracy"] > 2 * metrics["heldout_accuracy_majority"]
    assert metrics["heldout_rows_truncated"] == 1
    figures = json.loads((out / FIGURES).read_bytes())
    assert_figures_add_up(figures, metrics, 121)
    assert list(figures["per_source"]) == ["a", "b"]

    classify = pipeline("text-classification", model=str(out), tokenizer=str(out))
    texts = [{"text": row["text"], "text_pair": row["text_pair"]} for row in [*heldout, long]]
    answers = classify(texts, truncation=True)
    right = sum(answer["label"] == row["label"] for answer, row in zip(answers, [*heldout, long], strict=True))
    assert right == round(metrics["heldout_accuracy"] * 121)
    encoded = classify.tokenizer("a", "b")
    # A BERT tells the texts of a pair apart by types, a ModernBERT has none.
    assert ("token_type_ids" in encoded) == (architecture == "bert")
    # What the stage makes of a pair is what the published tokenizer makes of it, the one that is cut as well.
    frame = require_frame(classify.tokenizer, pair=True)
    for text in texts[-3:]:
        wanted = classify.tokenizer(**text, truncation=True)
        row = encode_row_of_texts(text, classify.tokenizer, frame, 64)
        assert row.ids == wanted["input_ids"]
        assert row.type_ids == wanted.get("token_type_ids", row.type_ids)


def test_refuses_pairs_among_single_texts_and_rows_yet_to_be_labelled(encoder: Path, tmp_path: Path) -> None:
    rows = request_rows()[:16]
    mixed = write_data(tmp_path / "mixed", [*rows, *pairs(rows)], rows)
    with pytest.raises(DataError, match=r"inputs\.labels: 16 rows are pairs of texts, and 32 are single texts"):
        run_task(STAGE, {"encoder": encoder, "labels": mixed}, PARAMS, tmp_path / "a")
    unlabelled = write_data(tmp_path / "unlabelled", rows, [{**rows[0], "label": None}])
    with pytest.raises(DataError, match=r"inputs\.labels: 1 of 17 have no label\. Label them with `annotate`"):
        run_task(STAGE, {"encoder": encoder, "labels": unlabelled}, PARAMS, tmp_path / "b")


def test_a_model_without_types_gets_none(tmp_path: Path) -> None:
    """A tokenizer that gives types 0 and 1, and a model with one type: the second would have no embedding."""
    from transformers import RobertaConfig

    from stages.lib.encoding.encoders import match_type_ids
    from stages.lib.text.frames import open_tokenizer

    make_tokenizer([row["text"] for row in request_rows()[:50]], vocabulary_size=600).save_pretrained(tmp_path)
    RobertaConfig(type_vocab_size=1, vocab_size=600).save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path, 32)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    match_type_ids(tokenizer, tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "saved")("a", "b")


def test_resumes_exactly_on_pairs(bert: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "labels", pairs(request_rows()[:40]), pairs(request_rows()[-10:]))
    require_exact_resume(STAGE, {"encoder": bert, "labels": data}, {"max_length_tokens": 48}, tmp_path)


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


def test_refuses_held_out_rows_of_which_training_knows_no_label(encoder: Path, tmp_path: Path) -> None:
    """Names in training, numbers in the held-out set: every figure would be 0. Named alike they are measured."""
    rows = request_rows()[:24]
    numbers = {label: str(number) for number, label in enumerate(sorted({row["label"] for row in rows}))}
    heldout = [{**row, "label": numbers[row["label"]]} for row in rows[:8]]
    data = write_data(tmp_path / "labels", rows, heldout)
    told = (
        r"inputs\.labels: no held-out row has a label that training knows: held out are '\d'.*, and in training '[a-z]"
    )
    with pytest.raises(DataError, match=told):
        run_task(STAGE, {"encoder": encoder, "labels": data}, {**PARAMS, "max_steps": 11}, tmp_path / "a")
    alike = write_data(tmp_path / "alike", [{**row, "label": numbers[row["label"]]} for row in rows], heldout)
    result, _ = run_task(STAGE, {"encoder": encoder, "labels": alike}, {**PARAMS, "max_steps": 11}, tmp_path / "b")
    assert result.metrics["heldout_rows_with_unseen_label"] == 0


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
