"""Answers whose steps are right or wrong, as tokens; what a process reward model learns from them, and what is measured.

N: answers, S: steps of the longest answer, T: tokens of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.formulas.calibration import area_under_roc, wins
from stages.lib.formulas.reward_losses import binary_loss, score_of_steps
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.opening import Preferences, tokenizer_of_policy
from stages.lib.preferring.pairs import category_name
from stages.lib.preferring.reward_models import outputs
from stages.lib.preferring.reward_reading import StepsReading
from stages.lib.preferring.scoring_params import ScoringParams
from stages.lib.preferring.step_tokens import encode_steps, right_of_tokens
from stages.lib.rows.canonical import Row
from stages.lib.text.batches import Collate, attention_mask, padded
from stages.lib.text.chat_fitting import TOO_LONG, why_of, with_why
from stages.lib.text.chat_template import UnfitChat
from stages.lib.text.tokenized_parts import TokenizedRow, TokenizedRows, Tokenizing, tokenize_input
from stages.lib.text.tokenizers import encode_texts
from stages.lib.training.evaluating import Evaluator, Metrics

WRONG, RIGHT, UNKNOWN = 1, 2, 3
"""The mark of a step's last token; those of all other tokens are 0."""

MARKS = {False: WRONG, True: RIGHT, None: UNKNOWN}

UNLABELLED_STEP = "step_without_label"
HOLDS_SEPARATOR = "step_holds_separator"
"""Where such an answer is scored as a whole, it is taken apart into more steps than it was trained on."""


class LabelledSteps(Sequence[dict[str, Any]]):
    """Tokenized answers in the order of their file, which stay on disk until a row is asked for.

    A row has `ids`, and as `marks` for each token what it ends: see `MARKS`.
    """

    def __init__(self, tokenized: TokenizedRows) -> None:
        self.tokenized = tokenized
        self.source_N: NDArray[np.str_] = tokenized.columns["source"]
        self.steps_N: NDArray[np.int64] = tokenized.columns["steps"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        ((ids, marks),) = self.tokenized.sequences(index)
        return {"ids": ids, "marks": marks}

    def labels(self) -> NDArray[np.float64]:
        """N x S: 1 for each step that is right, 0 for a wrong one, NaN for what is not known and beyond the last. Reads everything."""
        label_NS = np.full((len(self), int(self.steps_N.max())), np.nan)
        for number, row in enumerate(self):
            marks = row["marks"][row["marks"] > 0]
            label_NS[number, : len(marks)] = np.where(marks == UNKNOWN, np.nan, marks == RIGHT)
        return label_NS

    def last_ids(self) -> set[int]:
        """The ids that sequences end with. Reads everything."""
        return {int(row["ids"][-1]) for row in self}


def open_steps(ctx: Context, params: ScoringParams) -> Preferences[LabelledSteps]:
    """The input `step_labels` in tokens: the training answers, the held-out ones, and the ledger of both, written to the artifact.

    Raises `DataError` if answers may be longer than the model takes, its chat template is not fit for training, or too large a
    share of the rows cannot be used.
    """
    tokenizer, home = tokenizer_of_policy(ctx, params.max_length_tokens)
    require_seen(tokenizer, params.step_separator)
    how = tokenizing_steps(tokenizer, params.max_length_tokens, params.step_separator)
    train, heldout, ledger = tokenize_input(ctx, "step_labels", how, params.max_dropped_fraction)
    return Preferences(tokenizer, LabelledSteps(train), LabelledSteps(heldout), ledger, home)


def require_seen(tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
    """Raises `DataError` where the tokenizer takes the separator away: steps would be read where they do not end."""
    alone, ended = encode_texts(tokenizer, ["a", f"a{separator}"])
    if alone == ended or not encode_texts(tokenizer, [separator])[0]:
        what = f"is {separator!r}, of which the model's tokenizer makes no token: it takes white space away"
        raise DataError(Problem("params.step_separator", what, "Name one that is written, such as a line of its own."))


def tokenizing_steps(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, separator: str) -> Tokenizing:
    """Answers that have, with their prompt and the separators behind their steps, at most `max_length_tokens`; others are dropped."""

    def make(row: Row) -> TokenizedRow:
        steps = [step["content"] for step in row["steps"]]
        example = " | ".join(message["content"] for message in [*row["prompt"], *row["steps"]])
        try:
            ids, ends = encode_steps(tokenizer, row["prompt"], steps, separator)
        except UnfitChat as error:
            return TokenizedRow(reason=error.reason, example=with_why(why_of(error), example))
        if len(ids) > max_length_tokens:
            return TokenizedRow(reason=TOO_LONG, example=example)
        labels = iter(row["labels"])
        marks = [MARKS[next(labels)] if end else 0 for end in ends]
        repaired = {
            UNLABELLED_STEP: sum(label is None for label in row["labels"]),
            HOLDS_SEPARATOR: sum(separator in step.strip() for step in steps),
        }
        columns: dict[str, str | float] = {"source": category_name(row.get("source")), "steps": float(len(steps))}
        return TokenizedRow(
            [(ids, marks)], columns, repaired={name: count for name, count in repaired.items() if count}
        )

    return Tokenizing("steps", tokenizer, make, "max_length_tokens", [max_length_tokens, separator])


def collate_steps(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and `marks_BT`, padded on the right."""

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        ids = [row["ids"] for row in rows]
        batch = {"input_ids": padded(ids, padding_id), "attention_mask": attention_mask(ids)}
        return {**batch, "marks_BT": padded([row["marks"] for row in rows])}

    return collate


class StepsObjective:
    """`reward_losses.binary_loss` of each labelled step, at its last token, summed over steps."""

    def __init__(self, params: ScoringParams) -> None:
        self.reading = StepsReading(params.step_separator, params.answer_score)

    def count(self, batch: Tensors) -> torch.Tensor:
        return is_labelled(batch["marks_BT"]).sum()

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        right_BT, marks_BT = right_of_tokens(outputs(model, batch)), batch["marks_BT"]
        asked_BT = is_labelled(marks_BT)
        return binary_loss(right_BT[asked_BT], marks_BT[asked_BT] == RIGHT).sum()

    # What is measured

    def heldout_metrics(self, evaluator: Evaluator, rows: LabelledSteps, collate: Collate) -> Metrics:
        most = int(rows.steps_N.max())

        def measure(model: torch.nn.Module, batch: Tensors) -> Tensors:
            right_BT, marks_BT = right_of_tokens(outputs(model, batch)), batch["marks_BT"]
            right_NS = right_BT.new_full((len(right_BT), most), torch.nan)
            for right_S, right_T, marks_T in zip(right_NS, right_BT, marks_BT, strict=True):
                said = right_T[marks_T > 0]
                right_S[: len(said)] = said
            return {str(number): each for number, each in enumerate(right_NS.unbind(1))}

        found = evaluator.values(rows, collate, measure)
        return self.metrics_of(torch.stack([found[str(number)] for number in range(most)], dim=1), rows)

    def metrics_of(self, right_NS: torch.Tensor, rows: LabelledSteps) -> Metrics:
        """Of labelled steps: how often the log odds are on their side of 0, ties counted one half, and the area under the ROC
        curve; of answers whose every label is known: how often their score is above one half just if all steps are right.
        """
        label_NS = torch.from_numpy(rows.labels())
        known_NS = ~label_NS.isnan()
        right_K, label_K = right_NS[known_NS], label_NS[known_NS].bool()
        correct_NS = wins(torch.where(label_NS == 1, right_NS, -right_NS), torch.zeros_like(right_NS))
        said_NS = ~right_NS.isnan()
        score_N = torch.stack(
            [
                score_of_steps(right_S[said_S].sigmoid(), self.reading.answer_score)
                for right_S, said_S in zip(right_NS, said_NS, strict=True)
            ]
        )
        whole_N = (known_NS == said_NS).all(dim=1)
        good_N = (label_NS.nan_to_num(1) == 1).all(dim=1)[whole_N]
        metrics = {
            "heldout_loss": float(binary_loss(right_K, label_K).mean()),
            "heldout_accuracy": float(correct_NS[known_NS].mean()),
            "heldout_score": float(score_N.mean()),
        }
        for name in sorted(set(rows.source_N.tolist()) - {""}):
            of_source_NS = known_NS & torch.from_numpy(rows.source_N == name)[:, None]
            if bool(of_source_NS.any()) and not torch.equal(of_source_NS, known_NS):
                metrics[f"heldout_accuracy_of_{name}"] = float(correct_NS[of_source_NS].mean())
        if whole_N.any():
            metrics["heldout_answer_accuracy"] = float(((score_N[whole_N] > 0.5) == good_N).double().mean())
        for name, value_K, true_K in (("auc", right_K, label_K), ("answer_auc", score_N[whole_N], good_N)):
            if 0 < int(true_K.sum()) < len(true_K):
                metrics[f"heldout_{name}"] = area_under_roc(value_K, true_K)
        return metrics

    def baselines(self, heldout: LabelledSteps, before: Mapping[str, float]) -> Metrics:
        """What the fresh head says, and calling all steps, or answers, what most are."""
        label_NS = heldout.labels()
        share = float(np.nanmean(label_NS))
        names = ("loss", "accuracy", "auc", "answer_accuracy", "answer_auc")
        found = {f"heldout_{name}_base": before[f"heldout_{name}"] for name in names if f"heldout_{name}" in before}
        return {**found, "heldout_accuracy_majority": max(share, 1 - share)}


def is_labelled(marks_BT: torch.Tensor) -> torch.Tensor:
    return (marks_BT == WRONG) | (marks_BT == RIGHT)
