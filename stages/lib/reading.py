"""Extractive question answering as a task: questions in windows, the loss, and what is measured on held-out questions.

Shapes: `W` windows, `T` tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import nll_loss
from transformers import PreTrainedTokenizerBase

from stages.lib.encoders import call, model_inputs
from stages.lib.training import Evaluator, Tensors
from stages.lib.windows import (
    Question,
    answer_f1,
    answer_text,
    best_answers,
    evaluation_batch_size,
    exact_match,
    mean_units,
    random_answer,
    span_of_units,
)

NUM_CANDIDATES = 20
"""Answers that each window may put up."""


def training_windows(question: Question) -> Iterator[dict[str, Any]]:
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
        """The exact match and F1 of the model's answers, summed."""
        start_WT, end_WT = (each_WT.cpu() for each_WT in position_log_probs(model, batch))
        exact = f1 = 0.0
        first = 0
        for index in batch["questions"].tolist():
            question = self.heldout[index]
            mine = slice(first, first + len(question.windows))
            first = mine.stop
            answers, nothing = best_answers(
                question, start_WT[mine], end_WT[mine], NUM_CANDIDATES, self.max_answer_tokens
            )
            given = answer_text(question, answers, nothing, self.null_threshold)
            exact += exact_match(given, references_of(question))
            f1 += answer_f1(given, references_of(question))
        return {
            "exact_match": torch.tensor(exact, dtype=torch.float64),
            "f1": torch.tensor(f1, dtype=torch.float64),
        }

    def evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """Exact match and F1, means over the questions, each of its best reference."""
        size = evaluation_batch_size(evaluator.batch_size, [len(question.windows) for question in self.heldout])
        rows = [{"question": question} for question in self.heldout]
        sums = evaluator.sums(rows, self.collate_questions, self.measure, batch_size=size)
        return {f"heldout_{name}": sums[name] / len(self.heldout) for name in ("exact_match", "f1")}

    def baselines(self, training: Sequence[Question], seed: int) -> dict[str, float]:
        """What answers of the usual length reach, drawn from anywhere in the context, and taken from its beginning."""
        count = mean_units(question.references[0].text for question in training if question.references)
        drawn = [
            random_answer(question.context, count, f"{seed}:{index}") for index, question in enumerate(self.heldout)
        ]
        first = [span_of_units(question.context, 0, count) for question in self.heldout]
        return {
            "heldout_exact_match_random": self.mean(exact_match, drawn),
            "heldout_f1_random": self.mean(answer_f1, drawn),
            "heldout_f1_first": self.mean(answer_f1, first),
        }

    def mean(self, score: Any, answers: Sequence[str]) -> float:
        pairs = zip(answers, self.heldout, strict=True)
        return sum(score(answer, references_of(question)) for answer, question in pairs) / len(self.heldout)


def references_of(question: Question) -> list[str]:
    return [reference.text for reference in question.references]
