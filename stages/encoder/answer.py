"""A reader: an encoder under a head that points at the answer of a question in its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.encoding.params import check_encoder_task, estimate_encoder_task
from stages.lib.models.families import reading_problems
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.encoding.answering import Question
    from stages.lib.rows.canonical import Row
    from stages.lib.text.frames import Frame

SPECIAL_TOKENS = 4
"""The most that a tokenizer puts around and between question and context."""


class AnswerParams(TrainingParams):
    """How the reader is trained. One row is one window over a context; a long context has several."""

    max_length_tokens: int = Field(default=384, ge=16)
    """Tokens per window: the question, a part of the context, and special ones."""
    stride_tokens: int = Field(default=128, ge=0)
    """Tokens of the context that neighbouring windows share, so that an answer at a border is whole in one of them."""
    max_question_tokens: int = Field(default=64, ge=1)
    """Tokens of the question that are used. Longer ones lose their end, and are counted."""
    max_answer_tokens: int = Field(default=30, ge=1)
    """Tokens that an answer has at most. Answers of training may be longer."""
    null_threshold: float | None = None
    """How much better (in log-probability) "no answer" must score than the best answer for the question to stay unanswered. null: 0 if training has questions without answer, otherwise every question is answered."""

    def measures(self) -> tuple[str, ...]:
        names = ("exact_match", "f1", "exact_match_has_answer", "f1_has_answer", "exact_match_no_answer")
        return tuple(f"heldout_{name}" for name in names)

    @model_validator(mode="after")
    def windows_move_on(self) -> AnswerParams:
        room = self.max_length_tokens - self.max_question_tokens - SPECIAL_TOKENS
        if self.stride_tokens >= room:
            raise ValueError(
                f"stride_tokens {self.stride_tokens} must be below {room}, the room that max_length_tokens"
                f" {self.max_length_tokens} leaves beside a question of max_question_tokens {self.max_question_tokens}"
            )
        return self


def check(forecast: Forecast) -> list[Problem]:
    return [
        *check_encoder_task(forecast),
        *reading_problems(forecast.inputs.get("encoder", Estimate()).architecture or {}),
    ]


def run(ctx: Context, params: AnswerParams) -> Result:
    from transformers import AutoModelForQuestionAnswering

    from stages.lib.encoding.answering import (
        Reading,
        ReadingObjective,
        answer_figures,
        reading_windows,
        require_answered,
    )
    from stages.lib.encoding.figures import source_groups
    from stages.lib.encoding.task import Head, in_words, open_encoder, read_sides, train_task

    train_rows, heldout_rows = read_sides(ctx, "questions")
    require_answered([*train_rows, *heldout_rows], "inputs.questions")
    tokenizer, frame = open_encoder(ctx, params.max_length_tokens, pair=True)
    train_questions, heldout_questions = (
        read_questions(rows, tokenizer, frame, params) for rows in (train_rows, heldout_rows)
    )
    answers = [question.references[0].text for question in train_questions if question.references]
    if not answers:
        raise DataError(
            Problem("training rows", "hold no question with an answer", "There is nothing to learn to find.")
        )
    windows = [window for question in train_questions for window in reading_windows(question)]
    counts = {**count_questions(train_questions, "train"), **count_questions(heldout_questions, "heldout")}
    ctx.journal.note(f"{len(train_questions):,} training questions in {len(windows):,} windows; {in_words(counts)}")
    null_threshold = params.null_threshold
    if null_threshold is None and counts["train_questions_without_answer"]:
        null_threshold = 0.0
    task = Reading(tokenizer, heldout_questions, params.max_answer_tokens, null_threshold)
    return train_task(
        ctx,
        params,
        tokenizer=tokenizer,
        head=Head(AutoModelForQuestionAnswering, "question_answering"),
        task=task,
        objective=ReadingObjective(),
        data=windows,
        max_length_tokens=params.max_length_tokens,
        num_rows=(len(train_questions), len(heldout_questions)),
        baselines=lambda: task.baselines(answers, ctx.seed),
        figures=lambda found: answer_figures(heldout_questions, source_groups(heldout_rows), found),
        counts=counts,
    )


STAGE = Stage(
    kind="answer",
    version=3,
    summary="a reader: an encoder under a head that points at the answer of a question in its context",
    params=AnswerParams,
    inputs={
        "encoder": accepts(Kind.ENCODER),
        "questions": accepts(Kind.QUESTIONS),
        "extends": accepts(Kind.READER, optional=True),
    },
    output=Kind.READER,
    run=run,
    headline=(
        "heldout_exact_match",
        "heldout_f1",
        "heldout_f1_has_answer",
        "heldout_f1_silent",
        "heldout_f1_random",
        "heldout_f1_first",
    ),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=lambda forecast: estimate_encoder_task(forecast, None),
    check=check,
)


def read_questions(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, frame: Frame, params: AnswerParams
) -> list[Question]:
    """The rows cut into windows."""
    from stages.lib.encoding.answering import read_question

    shape = {
        "max_length": params.max_length_tokens,
        "stride": params.stride_tokens,
        "max_question": params.max_question_tokens,
    }
    return [read_question(row, tokenizer, frame, **shape) for row in rows]


def count_questions(questions: Sequence[Question], side: str) -> dict[str, float]:
    """How many windows there are, and how many questions are shortened, unanswerable, or answered across a border."""
    counts = {
        "windows": sum(len(question.windows) for question in questions),
        "questions_shortened": sum(question.shortened for question in questions),
        "questions_without_answer": sum(not question.references for question in questions),
        "answers_in_no_window": sum(
            bool(question.references) and not any(question.has_answer) for question in questions
        ),
    }
    return {f"{side}_{name}": float(count) for name, count in counts.items()}
