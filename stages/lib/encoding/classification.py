"""Classification of texts, and of pairs of texts: how rows become tokens, the loss, and what is measured.

    <cls> text <sep>                            one text: what is too long loses its end
    <cls> text <sep> text_pair <sep>            a pair: the longer text loses its end first, see `kept_of_pair`

Shapes: `B` rows, `L` labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from stages.lib.encoding.bags import BagOfWords
from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.figures import (
    PER_LENGTH,
    PER_SOURCE,
    as_figures,
    confusion,
    figures_of_groups,
    length_groups,
    source_groups,
)
from stages.lib.encoding.found import keep_found
from stages.lib.formulas.metrics import Tally
from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.text.frames import Frame, encode, kept_of_pair
from stages.lib.training.evaluating import Evaluator, Metrics


def are_pairs(rows: Sequence[Row], where: str) -> bool:
    """Whether the rows are pairs of texts. Raises `DataError` if some are, and others single texts."""
    pairs = sum("text_pair" in row for row in rows)
    if 0 < pairs < len(rows):
        what = f"{pairs:,} rows are pairs of texts, and {len(rows) - pairs:,} are single texts"
        hint = "Name `text_pair` in the columns of every source, which drops rows without one; or take a stage for each sort."
        raise DataError(Problem(where, what, hint))
    return pairs > 0


def require_labelled(rows: Sequence[Row], where: str) -> None:
    """Raises `DataError` if a row is yet to be labelled."""
    unlabelled = sum(row["label"] is None for row in rows)
    if unlabelled:
        what = f"{unlabelled:,} of {len(rows):,} have no label"
        raise DataError(Problem(where, what, "Label them with `annotate`, or read them without `unlabelled`."))


@dataclass(frozen=True)
class EncodedRow:
    """A text, or a pair of texts, as the model reads it."""

    ids: list[int]
    type_ids: list[int]
    num_tokens: int
    """Tokens of the text, or of both, before they were cut; without the special ones."""
    is_cut: bool
    label: str | None = None
    """What it is labelled; None where that is not known."""


def encode_row_of_texts(row: Row, tokenizer: PreTrainedTokenizerBase, frame: Frame, max_length: int) -> EncodedRow:
    """The texts of a row in their frame, cut to `max_length` tokens with the special ones."""
    room = max_length - len(frame)
    first, _ = encode(tokenizer, row["text"])
    second, _ = encode(tokenizer, row["text_pair"]) if "text_pair" in row else ([], [])
    kept = kept_of_pair(len(first), len(second), room) if "text_pair" in row else (min(len(first), room), 0)
    num_tokens = len(first) + len(second)
    ids = frame.around(first[: kept[0]], second[: kept[1]])
    return EncodedRow(ids, frame.type_ids(*kept), num_tokens, num_tokens > room, row.get("label"))


def classification_row(encoded: EncodedRow, label: int) -> dict[str, Any]:
    """The row as training sees it."""
    return {"input_ids": encoded.ids, "token_type_ids": encoded.type_ids, "label": label}


class ClassificationObjective:
    """Cross entropy per text: `-log softmax(logits)[label]`."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return torch.tensor(len(batch["labels"]))

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        logits_BL = call(model, batch).logits.float()
        return cross_entropy(logits_BL, batch["labels"], reduction="sum")


@dataclass(frozen=True)
class Classification:
    """How texts become tensors, and what is measured on held-out texts `{input_ids, token_type_ids, label}`."""

    tokenizer: PreTrainedTokenizerBase
    num_labels: int
    """Labels of training. Held-out texts may have others, with higher numbers, that no prediction ever meets."""
    heldout: list[dict[str, Any]]
    found: dict[int, int] = field(default_factory=dict)
    """The label found for each held-out text that this process measured last."""

    def collate(self, texts: list[dict[str, Any]]) -> Tensors:
        """Texts as tensors of B x T."""
        ids, type_ids = ([text[name] for text in texts] for name in ("input_ids", "token_type_ids"))
        inputs = model_inputs(self.tokenizer, ids, type_ids)
        return {**inputs, "labels": torch.tensor([text["label"] for text in texts])}

    def collate_heldout(self, texts: list[dict[str, Any]]) -> Tensors:
        """The same, and which of the held-out texts they are."""
        return {**self.collate(texts), "rows": torch.tensor([text["position"] for text in texts])}

    @cached_property
    def every_label(self) -> range:
        return range(max(self.num_labels, 1 + max(text["label"] for text in self.heldout)))

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """The loss of texts with a known label, and per label number k the texts rightly found, found, and wanted as k."""
        logits_BL = call(model, batch).logits.float()
        wanted_B, found_B = batch["labels"], logits_BL.argmax(dim=-1)
        self.found.update(zip(batch["rows"].tolist(), found_B.tolist(), strict=True))
        known_B = wanted_B < self.num_labels
        sums = {"loss": cross_entropy(logits_BL[known_B], wanted_B[known_B], reduction="sum"), "known": known_B.sum()}
        for label in self.every_label:
            sums[f"right_{label}"] = ((found_B == label) & (wanted_B == label)).sum()
            sums[f"found_{label}"] = (found_B == label).sum()
            sums[f"wanted_{label}"] = (wanted_B == label).sum()
        return sums

    def evaluate(self, evaluator: Evaluator) -> Metrics:
        """Accuracy, macro F1 (the mean over the labels that occur, among what is found or what is wanted) and loss."""
        self.found.clear()
        sums = evaluator.sums(self.heldout, self.collate_heldout, self.measure)
        keep_found(evaluator.ctx, self.found, len(self.heldout))
        tallies = {
            label: Tally(*(sums[f"{name}_{label}"] for name in ("right", "found", "wanted")))
            for label in self.every_label
        }
        means = {f"heldout_{name}": value for name, value in accuracy_and_macro_f1(tallies, len(self.heldout)).items()}
        return {**means, "heldout_loss": sums["loss"] / max(1.0, sums["known"])}


def tally_labels(found: Sequence[int], wanted: Sequence[int]) -> dict[int, Tally]:
    """Label -> how often it was found rightly, found, and wanted; of the labels that occur."""
    counts = Counter(found), Counter(wanted)
    right = Counter(one for one, other in zip(found, wanted, strict=True) if one == other)
    return {label: Tally(right[label], counts[0][label], counts[1][label]) for label in sorted({*found, *wanted})}


def accuracy_and_macro_f1(tallies: Mapping[int, Tally], num_rows: int) -> Metrics:
    """The share of rows whose label was found, and the mean F1 over the labels that occur, among what is found or wanted."""
    occurring = [tally for tally in tallies.values() if tally.found or tally.wanted]
    return {
        "accuracy": sum(tally.right for tally in tallies.values()) / num_rows,
        "macro_f1": sum(tally.f1 for tally in occurring) / len(occurring),
    }


@dataclass(frozen=True)
class Heldout:
    """Labelled rows that a classifier is measured on, and the rows that baselines learn from."""

    train_rows: Sequence[Row]
    rows: Sequence[Row]
    labels: Sequence[str]
    """The labels of all rows by number: those that can be found, and after them others that only these rows have."""
    num_tokens: Sequence[int]
    """Of each row."""

    @cached_property
    def wanted(self) -> list[int]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        return [numbers[row["label"]] for row in self.rows]

    @cached_property
    def bag_of_words(self) -> list[int]:
        """The number of the label that counting words finds for each row."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        return BagOfWords(self.train_rows, [numbers[row["label"]] for row in self.train_rows]).predict(self.rows)

    def baselines(self) -> Metrics:
        """Accuracy of the label that is most frequent in training, and the one expected of drawing labels evenly; accuracy
        and macro F1 of counting words (`BagOfWords`).
        """
        counts = Counter(row["label"] for row in self.train_rows)
        majority = min(counts, key=lambda label: (-counts[label], label))
        heldout = [row["label"] for row in self.rows]
        counted = accuracy_and_macro_f1(tally_labels(self.bag_of_words, self.wanted), len(heldout))
        return {
            "heldout_accuracy_majority": heldout.count(majority) / len(heldout),
            "heldout_accuracy_random": sum(label in counts for label in heldout) / len(heldout) / len(counts),
            **{f"heldout_{name}_bag_of_words": value for name, value in counted.items()},
        }

    def figures(self, found: Sequence[int]) -> dict[str, Any]:
        """What the labels found come to: per label (beside its F1 by counting words), which is taken for which, and by the
        rows' source and length.
        """
        tallies = tally_labels(found, self.wanted)
        beside = tally_labels(self.bag_of_words, self.wanted) if self.train_rows else {}
        per_label = {
            self.labels[label]: {
                **as_figures(tally),
                **({"f1_bag_of_words": beside.get(label, Tally()).f1} if beside else {}),
            }
            for label, tally in tallies.items()
        }
        named = [(self.labels[wanted], self.labels[one]) for wanted, one in zip(self.wanted, found, strict=True)]

        def of_rows(indices: Sequence[int]) -> dict[str, float]:
            some = tally_labels([found[index] for index in indices], [self.wanted[index] for index in indices])
            return {"rows": len(indices), **accuracy_and_macro_f1(some, len(indices))}

        groups = {PER_SOURCE: source_groups(self.rows), PER_LENGTH: length_groups(self.num_tokens)}
        return {
            "rows": len(self.rows),
            "per_label": per_label,
            "confusion_matrix": confusion(named),
            **figures_of_groups(groups, of_rows),
        }
