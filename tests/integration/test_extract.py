from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipeline.errors import DataError
from pipeline.settings.strict import validate
from stages.encoder.extract import STAGE, ExtractParams
from stages.lib.encoding.extraction import confused, found_spans, read_tagged_text, tagging_windows
from stages.lib.encoding.figures import FIGURES
from stages.lib.encoding.tagging import Span
from stages.lib.formulas.metrics import tally
from stages.lib.formulas.token_losses import IGNORE
from stages.lib.text.frames import open_tokenizer, require_frame
from tests.integration.tiny_encoder import (
    losses,
    request_encoder,
    request_rows,
    require_exact_resume,
    run_task,
    write_data,
)

pytestmark = pytest.mark.slow

INTENTS = ("add_to_playlist", "book_table")
PARAMS = {
    "global_batch_size": 32,
    "max_steps": 80,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "max_length_tokens": 24,
    "stride_tokens": 8,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def requests() -> list[dict]:
    return [row for row in request_rows() if row["label"] in INTENTS]


def test_learns_slots_in_windows_and_publishes_an_extractor_that_opens_as_one(encoder: Path, tmp_path: Path) -> None:
    rows = requests()
    heldout = rows[-100:]
    data = write_data(tmp_path / "spans", rows[:1500], heldout)
    result, out = run_task(STAGE, {"encoder": encoder, "spans": data}, PARAMS, tmp_path / "run")

    metrics = result.metrics
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] / 2
    assert metrics["heldout_f1"] > 0.3
    assert metrics["heldout_f1"] > 10 * metrics["heldout_f1_random"]
    assert metrics["heldout_f1_majority"] == 0
    assert 0.3 < metrics["heldout_f1_dictionary"] < 1
    precision, recall = metrics["heldout_precision"], metrics["heldout_recall"]
    assert metrics["heldout_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics["heldout_spans"] == sum(len(row["spans"]) for row in heldout)
    labels = sorted({span["label"] for row in rows[:1500] for span in row["spans"]})
    assert result.facts.labels == labels
    assert {f"heldout_f1_of_{label}" for label in labels} <= set(metrics)

    figures = json.loads((out / FIGURES).read_bytes())
    totals = {name: sum(each[name] for each in figures["per_label"].values()) for name in ("right", "found", "wanted")}
    assert 2 * totals["right"] / (totals["found"] + totals["wanted"]) == pytest.approx(metrics["heldout_f1"])
    for label, of_label in figures["per_label"].items():
        assert of_label["f1"] == metrics[f"heldout_f1_of_{label}"]
        row = figures["confusion_matrix"][label]
        assert (sum(row.values()), row.get(label, 0)) == (of_label["wanted"], of_label["right"])
    assert any(of_label["f1_dictionary"] > 0 for of_label in figures["per_label"].values())
    assert sum(group["wanted"] for group in figures["per_length_tokens"].values()) == metrics["heldout_spans"]

    # The published model and tokenizer, as anyone would open them, find as much.
    model, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert [model.config.id2label[number] for number in range(3)] == ["O", f"B-{labels[0]}", f"I-{labels[0]}"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    frame = require_frame(tokenizer, pair=False)
    right = found = wanted = several = 0
    for row in heldout:
        text = read_tagged_text(row, tokenizer, frame, labels, 24, 8)
        several += len(text.windows) > 1
        with torch.no_grad():
            rows_of_logits = [model.eval()(input_ids=torch.tensor([window.ids])).logits[0] for window in text.windows]
        logits = torch.nn.utils.rnn.pad_sequence(rows_of_logits, batch_first=True)
        for counted in tally(found_spans([text], logits, labels)[0], text.spans).values():
            right, found, wanted = right + counted.right, found + counted.found, wanted + counted.wanted
    assert several
    assert 2 * right / (found + wanted) == pytest.approx(metrics["heldout_f1"])


def test_every_token_is_learned_from_once(encoder: Path) -> None:
    """However many windows hold it."""
    tokenizer = open_tokenizer(encoder, 16)
    row = max(requests()[:200], key=lambda row: len(row["text"]))
    labels = sorted({span["label"] for span in row["spans"]})
    text = read_tagged_text(row, tokenizer, require_frame(tokenizer, pair=False), labels, 16, 6)
    windows = list(tagging_windows(text))
    assert len(windows) > 1
    learned = [tag for window in windows for tag in window["tags"] if tag != IGNORE]
    assert learned == text.tags


def test_the_spans_of_perfect_scores_are_the_spans_themselves(encoder: Path) -> None:
    """Over windows, padding and word-start spaces. Where a span begins within a token it is widened, and counted."""
    tokenizer = open_tokenizer(encoder, 16)
    rows = requests()[:60]
    labels = sorted({span["label"] for row in rows for span in row["spans"]})
    texts = [read_tagged_text(row, tokenizer, require_frame(tokenizer, pair=False), labels, 16, 6) for row in rows]
    width = max(len(window.ids) for text in texts for window in text.windows)
    logits = torch.zeros(sum(len(text.windows) for text in texts), width, 1 + 2 * len(labels))
    number = 0
    for text in texts:
        for window in text.windows:
            for place in range(window.size):
                logits[number, window.first + place, text.tags[window.start + place]] = 9.0
            number += 1
    exact = [text for text in texts if not text.counts]
    assert 40 < len(exact) < len(texts), "some Chinese names begin within a token"
    for text, found in zip(texts, found_spans(texts, logits, labels), strict=True):
        if text in exact:
            assert found == text.spans


def test_a_label_that_only_held_out_rows_have_counts_as_not_found(encoder: Path, tmp_path: Path) -> None:
    rows = requests()[:16]
    new = {"text": "on mars", "spans": [{"start": 3, "end": 7, "label": "planet"}]}
    data = write_data(tmp_path / "spans", rows, [*rows[:4], new])
    result, _ = run_task(STAGE, {"encoder": encoder, "spans": data}, {**PARAMS, "max_steps": 11}, tmp_path / "run")
    assert result.metrics["heldout_f1_of_planet"] == 0
    assert result.metrics["heldout_spans_unknown_label"] == 1
    assert "planet" not in (result.facts.labels or [])


def test_refuses_held_out_spans_of_which_training_knows_no_label(encoder: Path, tmp_path: Path) -> None:
    new = {"text": "on mars", "spans": [{"start": 3, "end": 7, "label": "planet"}]}
    data = write_data(tmp_path / "spans", requests()[:16], [new])
    with pytest.raises(
        DataError, match=r"inputs\.spans: no held-out row has a label that training knows: held out are 'planet'"
    ):
        run_task(STAGE, {"encoder": encoder, "spans": data}, {**PARAMS, "max_steps": 11}, tmp_path / "run")


def test_what_is_taken_for_what() -> None:
    """Of five spans one is found, one is taken for a place, one has another end, one is not found, and one was never there."""
    wanted = [Span(0, 2, "person"), Span(4, 6, "person"), Span(8, 12, "place"), Span(20, 22, "place")]
    found = [Span(0, 2, "person"), Span(4, 6, "place"), Span(8, 10, "place"), Span(30, 32, "person")]
    assert list(confused(found, wanted)) == [
        ("person", "person"),
        ("person", "place"),
        ("place", "(other borders)"),
        ("place", "(nothing)"),
        ("(nothing)", "person"),
    ]


def test_resumes_exactly(encoder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "spans", requests()[:20], requests()[-10:])
    params = {"max_length_tokens": 24, "stride_tokens": 8}
    require_exact_resume(STAGE, {"encoder": encoder, "spans": data}, params, tmp_path)


def test_refuses_rows_without_spans_and_windows_that_do_not_move_on(encoder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "spans", [{"text": "a", "spans": []}] * 4, [{"text": "a", "spans": []}])
    with pytest.raises(DataError, match="training rows: hold no span"):
        run_task(STAGE, {"encoder": encoder, "spans": data}, PARAMS, tmp_path / "run")
    params, problems = validate(ExtractParams, {**PARAMS, "stride_tokens": 12}, "stages.extract.params")
    assert params is None
    assert [str(problem) for problem in problems] == [
        "stages.extract.params: stride_tokens 12 must be below half of max_length_tokens 24."
    ]
