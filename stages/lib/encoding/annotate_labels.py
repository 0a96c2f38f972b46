"""What a classifier says of texts, or of pairs of texts. Shapes: `B` rows, `L` labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from pipeline.errors import DataError, Problem
from stages.lib.encoding.annotation import DIGITS, Found, Measured
from stages.lib.encoding.classification import (
    EncodedRow,
    Heldout,
    accuracy_and_macro_f1,
    are_pairs,
    encode_row_of_texts,
    tally_labels,
)
from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.published import Published, renamed, require_known
from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.text.frames import frame_as_it_is
from stages.lib.training.evaluating import Metrics

MOST_SCORES = 5
"""Labels of a row whose probabilities are told, the most probable ones."""


class ClassifyingAnnotator:
    """A label for each text, or pair of texts."""

    auto_class = AutoModelForSequenceClassification

    def __init__(self, published: Published, params: Any, rows: Sequence[Row]) -> None:
        self.names = renamed(published.labels(), params.labels)
        self.labels = sorted(set(self.names), key=self.names.index)
        self.places_L = torch.tensor([self.labels.index(name) for name in self.names])
        pair = are_pairs(rows, "inputs.rows")
        if published.takes_pairs is not None and published.takes_pairs != pair:
            sorts = ("pairs of texts", "single texts")
            what = f"was trained on {sorts[pair]}, and the rows are {sorts[not pair]}"
            raise DataError(Problem("inputs.model", what, "Give it rows of its own sort."))
        known = Counter(row["label"] for row in rows if self.is_known(row))
        require_known(known, self.labels, params.unknown_labels == "count")
        self.tokenizer, self.length = published.tokenizer, published.length(params.max_length_tokens)
        self.frame = frame_as_it_is(self.tokenizer, pair=pair)

    def read(self, row: Row) -> EncodedRow:
        return encode_row_of_texts(row, self.tokenizer, self.frame, self.length)

    def num_windows(self, item: EncodedRow) -> int:
        return 1

    def num_tokens(self, item: EncodedRow) -> int:
        return len(item.ids)

    def is_cut(self, item: EncodedRow) -> bool:
        return item.is_cut

    def collate(self, items: Sequence[EncodedRow]) -> Tensors:
        return model_inputs(self.tokenizer, [item.ids for item in items], [item.type_ids for item in items])

    def find(self, model: torch.nn.Module, batch: Tensors, items: Sequence[EncodedRow]) -> list[Found]:
        """The most probable label, and of rows with a label that the model knows the loss, -log p of it.

        Labels of the model that rows call alike are one: their probabilities are added.
        """
        each_BL = call(model, batch).logits.float().softmax(dim=-1).cpu()
        probs_BL = torch.zeros(len(items), len(self.labels)).index_add_(1, self.places_L, each_BL)
        found = []
        for item, probs_L in zip(items, probs_BL, strict=True):
            best = probs_L.topk(min(MOST_SCORES, len(self.labels)))
            number = int(probs_L.argmax())
            scores = [
                [self.labels[k], round(p, DIGITS)]
                for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            each: Found = {"label": number, "score": round(float(probs_L[number]), DIGITS), "scores": scores}
            if item.label in self.labels:
                wanted = probs_L[self.labels.index(item.label)].clamp_min(torch.finfo(torch.float32).tiny)
                each["loss"] = round(-float(wanted.log()), DIGITS)
            found.append(each)
        return found

    def annotate(self, row: Row, found: Found) -> Row:
        given = {"given": row["label"]} if self.is_known(row) else {}
        annotation = {"score": found["score"], "scores": dict(found["scores"]), **given}
        return {**row, "label": self.labels[found["label"]], "annotation": annotation}

    def summary(self, found: Sequence[Found]) -> Metrics:
        counts = Counter(each["label"] for each in found)
        return {f"rows_labelled_{label}": float(counts[number]) for number, label in enumerate(self.labels)}

    def is_known(self, row: Row) -> bool:
        return row.get("label") is not None

    def measure(self, rows: Sequence[Row], found: Sequence[Found], training: Sequence[Row], seed: int) -> Measured:
        others = {row["label"] for row in (*rows, *training)} - set(self.labels)
        lengths = [self.read(row).num_tokens for row in rows]
        heldout = Heldout(training, rows, [*self.labels, *sorted(others)], lengths)
        numbers = [each["label"] for each in found]
        means = accuracy_and_macro_f1(tally_labels(numbers, heldout.wanted), len(rows))
        metrics = {f"heldout_{name}": value for name, value in means.items()}
        losses = [each["loss"] for each in found if "loss" in each]
        metrics["heldout_loss"] = sum(losses) / max(1, len(losses))
        metrics["heldout_rows_with_unseen_label"] = float(sum(number >= len(self.labels) for number in heldout.wanted))
        return {**metrics, **(heldout.baselines() if training else {})}, heldout.figures(numbers)
