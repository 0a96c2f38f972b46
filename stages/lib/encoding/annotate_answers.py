"""What a reader says of questions on a context. Shapes: `W` windows, `T` tokens of a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from pipeline.errors import DataError, Problem
from stages.lib.encoding.annotation import DIGITS, Found, Measured
from stages.lib.encoding.answering import (
    NUM_CANDIDATES,
    Question,
    Reading,
    answer_figures,
    answer_means,
    best_answers,
    position_log_probs,
    read_question,
)
from stages.lib.encoding.encoders import model_inputs
from stages.lib.encoding.figures import source_groups
from stages.lib.encoding.published import Published
from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.text.frames import frame_as_it_is
from stages.lib.training.evaluating import Metrics


class AnsweringAnnotator:
    """An answer to each question, out of its context, or none."""

    auto_class = AutoModelForQuestionAnswering

    def __init__(self, published: Published, params: Any, rows: Sequence[Row]) -> None:
        if params.labels:
            raise DataError(Problem("params.labels", "renames labels, and a reader has none", "Remove it."))
        self.tokenizer, self.length = published.tokenizer, published.length(params.max_length_tokens)

        def chosen(name: str, otherwise: int) -> Any:
            given = getattr(params, name)
            return published.trained_with(name, otherwise) if given is None else given

        self.max_question = chosen("max_question_tokens", min(64, self.length // 4))
        self.max_answer = chosen("max_answer_tokens", 30)
        self.stride = chosen("stride_tokens", min(128, self.length // 4))
        self.null_threshold = chosen("null_threshold", None)
        manifest = published.manifest
        if self.null_threshold is None and manifest and manifest.metrics.get("train_questions_without_answer"):
            self.null_threshold = 0.0
        self.frame = frame_as_it_is(self.tokenizer, pair=True)

    def read(self, row: Row) -> Question:
        shape = {"max_length": self.length, "stride": self.stride, "max_question": self.max_question}
        return read_question(row, self.tokenizer, self.frame, **shape)

    def num_windows(self, item: Question) -> int:
        return len(item.windows)

    def num_tokens(self, item: Question) -> int:
        return len(item.windows[0].ids)

    def is_cut(self, item: Question) -> bool:
        return item.shortened

    def collate(self, items: Sequence[Question]) -> Tensors:
        windows = [window for item in items for window in item.windows]
        return model_inputs(self.tokenizer, [each.ids for each in windows], [each.type_ids for each in windows])

    def find(self, model: torch.nn.Module, batch: Tensors, items: Sequence[Question]) -> list[Found]:
        """The best answer, as sure as its first token's probability times its last one's; or none, where that is likelier."""
        start_WT, end_WT = (each_WT.cpu() for each_WT in position_log_probs(model, batch))
        found: list[Found] = []
        first = 0
        for question in items:
            mine = slice(first, first + len(question.windows))
            first = mine.stop
            answers, nothing = best_answers(question, start_WT[mine], end_WT[mine], NUM_CANDIDATES, self.max_answer)
            silent = (
                self.null_threshold is not None and bool(answers) and nothing - answers[0].score > self.null_threshold
            )
            best = answers[0] if answers and not silent else None
            log_score = torch.tensor(best.score if best else nothing)
            answer = [best.start, question.context[best.start : best.end]] if best else None
            found.append({"answer": answer, "score": round(float(log_score.exp().clamp(max=1.0)), DIGITS)})
        return found

    def annotate(self, row: Row, found: Found) -> Row:
        answers = [{"start": found["answer"][0], "text": found["answer"][1]}] if found["answer"] else []
        given = {"given": row["answers"]} if self.is_known(row) else {}
        return {**row, "answers": answers, "annotation": {"score": found["score"], **given}}

    def summary(self, found: Sequence[Found]) -> Metrics:
        answered = sum(each["answer"] is not None for each in found)
        return {"questions_answered": float(answered), "questions_left_unanswered": float(len(found) - answered)}

    def is_known(self, row: Row) -> bool:
        return row.get("answers") is not None

    def measure(self, rows: Sequence[Row], found: Sequence[Found], training: Sequence[Row], seed: int) -> Measured:
        questions = [self.read(row) for row in rows]
        given = [each["answer"][1] if each["answer"] else "" for each in found]
        means = answer_means(questions, given)
        metrics = {f"heldout_{name}": value for name, value in means.items() if name != "rows"}
        metrics["heldout_questions_without_answer"] = float(sum(not question.references for question in questions))
        answers = [row["answers"][0]["text"] for row in training if row["answers"]]
        if answers:
            reading = Reading(self.tokenizer, questions, self.max_answer, self.null_threshold)
            metrics |= reading.baselines(answers, seed)
        return metrics, answer_figures(questions, source_groups(rows), given)
