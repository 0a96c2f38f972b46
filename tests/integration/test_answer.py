from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from pipeline.errors import DataError
from pipeline.settings.strict import validate
from stages.encoder.answer import STAGE, AnswerParams
from stages.lib.encoding.figures import FIGURES
from tests.integration.tiny_encoder import (
    losses,
    request_encoder,
    request_rows,
    require_exact_resume,
    run_task,
    write_data,
)
from tests.rows import slot_questions

pytestmark = pytest.mark.slow

INTENTS = ("add_to_playlist", "book_table")
WINDOWS = {"max_length_tokens": 32, "stride_tokens": 8, "max_question_tokens": 12, "max_answer_tokens": 10}
PARAMS = {"global_batch_size": 32, "max_steps": 120, "learning_rate": 3e-3, "warmup_steps": 10, **WINDOWS}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request_encoder(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def questions() -> list[dict]:
    return slot_questions(row for row in request_rows() if row["label"] in INTENTS)


def test_learns_to_point_at_slots_and_publishes_a_reader_that_opens_as_one(encoder: Path, tmp_path: Path) -> None:
    rows = questions()
    data = write_data(tmp_path / "questions", rows[:2500], rows[-150:])
    result, out = run_task(STAGE, {"encoder": encoder, "questions": data}, PARAMS, tmp_path / "run")

    metrics = result.metrics
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] * 0.7
    assert metrics["heldout_f1"] > 1.5 * metrics["heldout_f1_random"]
    assert metrics["heldout_f1"] > 1.5 * metrics["heldout_f1_first"]
    assert metrics["heldout_exact_match"] > 2 * metrics["heldout_exact_match_random"]
    assert metrics["heldout_f1"] >= metrics["heldout_exact_match"]
    assert metrics["heldout_windows"] > 150
    assert not [name for name in metrics if "has_answer" in name or "silent" in name], "all have answers"
    assert result.facts.head_type == "question_answering"

    _, report = AutoModelForQuestionAnswering.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    # As anyone would use it: question and context go in together, parted as in training.
    tokenizer = AutoTokenizer.from_pretrained(out)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer("which artist ?", "add U2")["input_ids"]
    assert (encoded[0], encoded.count(end), encoded[-1]) == (start, 2, end)


def test_questions_without_answer_are_learned_and_left_unanswered(encoder: Path, tmp_path: Path) -> None:
    """Asked for a playlist, a restaurant request has none; asked of a playlist request, there is one."""
    rows = [
        {"id": str(number), "context": row["text"], "question": "which playlist ?", "answers": answers}
        for number, row in enumerate(request_rows())
        if row["label"] in INTENTS
        for answers in [[slot(row, span) for span in row["spans"] if span["label"] == "playlist"][:1]]
    ]
    data = write_data(tmp_path / "questions", rows[:1500], rows[-100:])
    params = {**PARAMS, "max_steps": 100, "max_length_tokens": 64}
    result, out = run_task(STAGE, {"encoder": encoder, "questions": data}, params, tmp_path / "run")
    metrics = result.metrics
    empty = sum(not row["answers"] for row in rows[-100:])
    assert metrics["heldout_questions_without_answer"] == empty
    assert 20 < empty < 80
    # Both kinds apart add up to the whole, and silence reaches the share of those without answer.
    assert metrics["heldout_f1_silent"] == empty / 100
    halves = (100 - empty) * metrics["heldout_f1_has_answer"] + empty * metrics["heldout_exact_match_no_answer"]
    assert halves == pytest.approx(100 * metrics["heldout_f1"])
    halves = (100 - empty) * metrics["heldout_exact_match_has_answer"] + empty * metrics[
        "heldout_exact_match_no_answer"
    ]
    assert halves == pytest.approx(100 * metrics["heldout_exact_match"])
    figures = json.loads((out / FIGURES).read_bytes())
    assert {f"heldout_{name}": value for name, value in figures.items() if f"heldout_{name}" in metrics} == {
        name: pytest.approx(metrics[name]) for name in metrics if name.removeprefix("heldout_") in figures
    }
    assert {"f1", "f1_has_answer", "exact_match_no_answer"} <= set(figures)
    groups = figures["per_length_tokens"].values()
    assert sum(group["rows"] * group["f1"] for group in groups) == pytest.approx(100 * metrics["heldout_f1"])
    # Answering none at all would reach the share of those without answer; answering each, at most the rest.
    assert metrics["heldout_f1"] > max(empty, 100 - empty) / 100 + 0.05


def slot(row: dict, span: dict) -> dict:
    return {"start": span["start"], "text": row["text"][span["start"] : span["end"]]}


def test_resumes_exactly(encoder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "questions", questions()[:20], questions()[-10:])
    require_exact_resume(STAGE, {"encoder": encoder, "questions": data}, WINDOWS, tmp_path)


def test_refuses_questions_without_answers_and_windows_without_room(encoder: Path, tmp_path: Path) -> None:
    row = {"id": "1", "context": "a b", "question": "c", "answers": []}
    data = write_data(tmp_path / "questions", [row] * 4, [row])
    with pytest.raises(DataError, match="training rows: hold no question with an answer"):
        run_task(STAGE, {"encoder": encoder, "questions": data}, PARAMS, tmp_path / "run")
    unknown = write_data(tmp_path / "unknown", [*questions()[:8], {**row, "answers": None}], [row])
    with pytest.raises(DataError, match=r"inputs\.questions: of 1 of 10 questions the answer is not known"):
        run_task(STAGE, {"encoder": encoder, "questions": unknown}, PARAMS, tmp_path / "run")
    params, problems = validate(AnswerParams, {**PARAMS, "stride_tokens": 16}, "stages.answer.params")
    assert params is None
    # 32 - 12 for the question - 4 special tokens.
    assert "\n".join(map(str, problems)) == (
        "stages.answer.params: stride_tokens 16 must be below 16, the room that max_length_tokens 32 leaves beside a"
        " question of max_question_tokens 12."
    )
