"""Extractive question answering: questions in windows, labels, the loss, the best answers over all windows, and what is
measured on held-out questions.

A window's first token stands for "no answer here": its position, 0, is the label of a window without the answer.
Shapes: `W` windows, `T` tokens of a window.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import nll_loss
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.figures import PER_LENGTH, PER_SOURCE, figures_of_groups, length_groups
from stages.lib.encoding.found import keep_found
from stages.lib.formulas.metrics import UNIT, answer_exact_match, answer_f1
from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.text.frames import Frame, encode
from stages.lib.text.offsets import Offset, overlapping, trim
from stages.lib.text.windows import TextWindow, evaluation_batch_size, windows_of
from stages.lib.training.evaluating import Evaluator


def window_label(window: TextWindow, offsets: Sequence[Offset], start: int, end: int) -> tuple[int, int]:
    """The first and last position, among the window's ids, of the characters `start` to `end` of the text.

    (0, 0) where the window does not hold all of them.
    """
    found = overlapping(offsets, start, end)
    if found is None or found[0] < window.start or found[1] >= window.start + window.size:
        return 0, 0
    return found[0] - window.start + window.first, found[1] - window.start + window.first


@dataclass(frozen=True)
class Reference:
    """An answer that counts as right."""

    start: int
    text: str


@dataclass(frozen=True)
class Question:
    """A question with all windows over its context. `labels` has the first reference's position in each window."""

    context: str
    references: list[Reference]
    offsets: list[Offset]
    windows: list[TextWindow]
    labels: list[tuple[int, int]]
    shortened: bool
    """Whether the question was longer than allowed, and lost its end."""

    @property
    def has_answer(self) -> list[bool]:
        """Whether each window holds the whole answer. No answer begins at a window's first position."""
        return [label != (0, 0) for label in self.labels]


def read_question(
    row: dict, tokenizer: PreTrainedTokenizerBase, frame: Frame, *, max_length: int, stride: int, max_question: int
) -> Question:
    """The row `{context, question, answers}` cut into windows of at most `max_length` tokens."""
    question, _ = encode(tokenizer, row["question"])
    context, offsets = encode(tokenizer, row["context"])
    windows = windows_of(frame, context, max_length, stride, question[:max_question])
    references = [Reference(answer["start"], answer["text"]) for answer in row["answers"] or ()]
    labels = [(0, 0)] * len(windows)
    if references:
        start, end = trim(row["context"], references[0].start, references[0].start + len(references[0].text))
        labels = [window_label(window, offsets, start, end) for window in windows]
    return Question(row["context"], references, offsets, windows, labels, len(question) > max_question)


def require_answered(rows: Sequence[Row], where: str) -> None:
    """Raises `DataError` if it is not known of a question whether it has an answer."""
    unknown = sum(row["answers"] is None for row in rows)
    if unknown:
        what = f"of {unknown:,} of {len(rows):,} questions the answer is not known"
        raise DataError(Problem(where, what, "Answer them with `annotate`, or read them without `unlabelled`."))


@dataclass(frozen=True)
class Answer:
    """Characters of the context, and the log-probability that the first of their tokens and the last are the answer's."""

    start: int
    end: int
    score: float


def best_answers(
    question: Question,
    start_log_probs: Sequence[torch.Tensor],
    end_log_probs: Sequence[torch.Tensor],
    n_best: int,
    max_tokens: int,
) -> tuple[list[Answer], float]:
    """The `n_best` answers over all windows of the question, best first, and the score of there being none.

    The log-probabilities are one vector of T per window: unlike logits, they can be compared between windows. An answer
    has at most `max_tokens`, all in one window, and scores log p(its first token) + log p(its last); found in several
    windows, it keeps its best score. The score of no answer is the lowest, over the windows, of the first position's:
    every window must agree that it is empty.
    """
    scores: dict[Offset, float] = {}
    nothing = float("inf")
    for window, start_T, end_T in zip(question.windows, start_log_probs, end_log_probs, strict=True):
        nothing = min(nothing, float(start_T[0] + end_T[0]))
        inside = slice(window.first, window.first + window.size)
        pairs_TT = start_T[inside, None].double() + end_T[None, inside].double()
        allowed_TT = torch.ones_like(pairs_TT, dtype=torch.bool).triu().tril(max_tokens - 1)
        pairs_TT = pairs_TT.masked_fill(~allowed_TT, float("-inf"))
        top = pairs_TT.flatten().topk(min(n_best, int(allowed_TT.sum())))
        for score, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            first, last = divmod(place, window.size)
            left, right = question.offsets[window.start + first][0], question.offsets[window.start + last][1]
            left, right = trim(question.context, left, right)
            if left < right:
                scores[left, right] = max(score, scores.get((left, right), float("-inf")))
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    return [Answer(start, end, score) for (start, end), score in ranked], nothing


def answer_text(question: Question, answers: Sequence[Answer], nothing: float, null_threshold: float | None) -> str:
    """The best answer's text; empty if there is none, or if its absence scores more than `null_threshold` higher."""
    if not answers or (null_threshold is not None and nothing - answers[0].score > null_threshold):
        return ""
    return question.context[answers[0].start : answers[0].end]


def span_of_units(context: str, first: int, count: int) -> str:
    """The part of the context from unit number `first` to `count` units on."""
    found = list(UNIT.finditer(context))[first : first + count]
    return context[found[0].start() : found[-1].end()] if found else ""


def random_answer(context: str, count: int, seed: str) -> str:
    """`count` units of the context, from anywhere: what chance finds."""
    places = max(1, len(UNIT.findall(context)) - count + 1)
    return span_of_units(context, random.Random(seed).randrange(places), count)


def mean_units(texts: Iterable[str]) -> int:
    """The mean number of units of the texts, rounded, and at least 1."""
    counts = [len(UNIT.findall(text)) for text in texts]
    return max(1, round(sum(counts) / len(counts))) if counts else 1


APART = {
    "exact_match_has_answer": "has_answer",
    "f1_has_answer": "has_answer",
    "exact_match_no_answer": "no_answer",
}
"""What is measured of one kind of questions -> the kind. To an answer that should not be, the two measures are the same."""

NUM_CANDIDATES = 20
"""Answers that each window may put up."""


def reading_windows(question: Question) -> Iterator[dict[str, Any]]:
    """`{input_ids, token_type_ids, start, end}` per window; start and end are 0 where the answer is not in it."""
    for window, (start, end) in zip(question.windows, question.labels, strict=True):
        yield {"input_ids": window.ids, "token_type_ids": window.type_ids, "start": start, "end": end}


class ReadingObjective:
    """Two cross entropies over the positions of a window: `-(log p(start) + log p(end)) / 2`. Devlin et al. 2019."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return torch.tensor(len(batch["start"]))

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        start_WT, end_WT = position_log_probs(model, batch)
        return (
            nll_loss(start_WT, batch["start"], reduction="sum") + nll_loss(end_WT, batch["end"], reduction="sum")
        ) / 2


def position_log_probs(model: torch.nn.Module, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Per window, of W x T, the log-probability of each position to be the first, and the last, of the answer.

    Padding is no position: otherwise the loss of a window would depend on how long its neighbours are.
    """
    output = call(model, batch)
    padding_WT = batch["attention_mask"] == 0
    lowest = torch.finfo(torch.float32).min
    start_WT, end_WT = (
        logits_WT.float().masked_fill(padding_WT, lowest).log_softmax(dim=-1)
        for logits_WT in (output.start_logits, output.end_logits)
    )
    return start_WT, end_WT


@dataclass(frozen=True)
class Reading:
    """How windows become tensors, and what is measured on held-out questions."""

    tokenizer: PreTrainedTokenizerBase
    heldout: list[Question]
    max_answer_tokens: int
    null_threshold: float | None
    found: dict[int, str] = field(default_factory=dict)
    """The answer given to each held-out question that this process measured last."""

    def collate(self, rows: list[dict[str, Any]]) -> Tensors:
        """Training windows as tensors of W x T."""
        inputs = model_inputs(
            self.tokenizer, [row["input_ids"] for row in rows], [row["token_type_ids"] for row in rows]
        )
        return {**inputs, **{name: torch.tensor([row[name] for row in rows]) for name in ("start", "end")}}

    def collate_questions(self, rows: list[dict[str, Any]]) -> Tensors:
        """All windows of some held-out questions, and which questions these are."""
        windows = [window for row in rows for window in row["question"].windows]
        inputs = model_inputs(self.tokenizer, [w.ids for w in windows], [w.type_ids for w in windows])
        return {**inputs, "questions": torch.tensor([row["position"] for row in rows])}

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """The exact match and F1 of the model's answers, summed, and those of questions with an answer, and without, apart."""
        start_WT, end_WT = (each_WT.cpu() for each_WT in position_log_probs(model, batch))
        sums = dict.fromkeys(("exact_match", "f1", *APART), 0.0)
        first = 0
        for index in batch["questions"].tolist():
            question = self.heldout[index]
            mine = slice(first, first + len(question.windows))
            first = mine.stop
            answers, nothing = best_answers(
                question, start_WT[mine], end_WT[mine], NUM_CANDIDATES, self.max_answer_tokens
            )
            given = answer_text(question, answers, nothing, self.null_threshold)
            self.found[index] = given
            exact, f1 = (score(given, references_of(question)) for score in (answer_exact_match, answer_f1))
            sums["exact_match"] += exact
            sums["f1"] += f1
            if question.references:
                sums["exact_match_has_answer"] += exact
                sums["f1_has_answer"] += f1
            else:
                sums["exact_match_no_answer"] += exact
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}

    def evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """Exact match and F1, means over the questions, each of its best reference; where some have no answer, those of both
        kinds apart as well, as SQuAD 2.0 has them (for a question without answer the two are the same).
        """
        self.found.clear()
        size = evaluation_batch_size(evaluator.batch_size, [len(question.windows) for question in self.heldout])
        rows = [{"question": question} for question in self.heldout]
        sums = evaluator.sums(rows, self.collate_questions, self.measure, batch_size=size)
        keep_found(evaluator.ctx, self.found, len(self.heldout))
        answerable = sum(bool(question.references) for question in self.heldout)
        counts = {"has_answer": answerable, "no_answer": len(self.heldout) - answerable}
        means = {name: sums[name] / len(self.heldout) for name in ("exact_match", "f1")}
        if all(counts.values()):
            means |= {name: sums[name] / counts[kind] for name, kind in APART.items()}
        return {f"heldout_{name}": value for name, value in means.items()}

    def baselines(self, answers: Iterable[str], seed: int) -> dict[str, float]:
        """What answers as long as `answers` usually are reach, drawn from anywhere in the context, and taken from its beginning; and, where
        some questions have no answer, what is reached by never giving one.
        """
        count = mean_units(answers)
        drawn = [
            random_answer(question.context, count, f"{seed}:{index}") for index, question in enumerate(self.heldout)
        ]
        first = [span_of_units(question.context, 0, count) for question in self.heldout]
        silent = self.mean(answer_f1, [""] * len(self.heldout))
        return {
            **({"heldout_f1_silent": silent} if silent else {}),
            "heldout_exact_match_random": self.mean(answer_exact_match, drawn),
            "heldout_f1_random": self.mean(answer_f1, drawn),
            "heldout_f1_first": self.mean(answer_f1, first),
        }

    def mean(self, score: Any, answers: Sequence[str]) -> float:
        pairs = zip(answers, self.heldout, strict=True)
        return sum(score(answer, references_of(question)) for answer, question in pairs) / len(self.heldout)


def references_of(question: Question) -> list[str]:
    return [reference.text for reference in question.references]


def answer_means(questions: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """How many questions there are, exact match and F1; and of those with and without an answer apart, where there are both."""
    scores = []
    for question, answer in zip(questions, given, strict=True):
        references = references_of(question)
        scores.append((bool(references), answer_exact_match(answer, references), answer_f1(answer, references)))

    def means(chosen: list[tuple[bool, float, float]], suffix: str = "") -> dict[str, float]:
        count = len(chosen)
        exact, f1 = (sum(each[place] for each in chosen) / count for place in (1, 2))
        return {f"exact_match{suffix}": exact, f"f1{suffix}": f1}

    answerable, empty = [each for each in scores if each[0]], [each for each in scores if not each[0]]
    found = {"rows": len(questions), **means(scores)}
    if answerable and empty:
        found |= means(answerable, "_has_answer")
        found["exact_match_no_answer"] = means(empty)["exact_match"]
    return found


def answer_figures(questions: Sequence[Question], sources: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """What the answers given come to, in all and by the rows' source and the length of their context."""

    def of_questions(indices: Sequence[int]) -> dict[str, float]:
        return answer_means([questions[index] for index in indices], [given[index] for index in indices])

    groups = {PER_SOURCE: sources, PER_LENGTH: length_groups([len(each.offsets) for each in questions])}
    return {**answer_means(questions, given), **figures_of_groups(groups, of_questions)}
