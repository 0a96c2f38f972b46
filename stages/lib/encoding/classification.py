"""Classification of whole texts: the loss, accuracy and macro F1, and what chance reaches.

Shapes: `B` texts, `L` labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.formulas.metrics import Tally
from stages.lib.formulas.token_losses import Tensors
from stages.lib.training.evaluating import Evaluator


class ClassificationObjective:
    """Cross entropy per text: `-log softmax(logits)[label]`."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return torch.tensor(len(batch["labels"]))

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        logits_BL = call(model, batch).logits.float()
        return cross_entropy(logits_BL, batch["labels"], reduction="sum")


@dataclass(frozen=True)
class Classification:
    """How texts become tensors, and what is measured on held-out texts `{input_ids, label}`."""

    tokenizer: PreTrainedTokenizerBase
    num_labels: int
    """Labels of training. Held-out texts may have others, with higher numbers, that no prediction ever meets."""
    heldout: list[dict[str, Any]]

    def collate(self, texts: list[dict[str, Any]]) -> Tensors:
        """Texts as tensors of B x T."""
        ids = [text["input_ids"] for text in texts]
        inputs = model_inputs(self.tokenizer, ids, [[0] * len(each) for each in ids])
        return {**inputs, "labels": torch.tensor([text["label"] for text in texts])}

    @cached_property
    def every_label(self) -> range:
        return range(max(self.num_labels, 1 + max(text["label"] for text in self.heldout)))

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """The loss of texts with a known label, and per label number k the texts rightly found, found, and wanted as k."""
        logits_BL = call(model, batch).logits.float()
        wanted_B, found_B = batch["labels"], logits_BL.argmax(dim=-1)
        known_B = wanted_B < self.num_labels
        sums = {"loss": cross_entropy(logits_BL[known_B], wanted_B[known_B], reduction="sum"), "known": known_B.sum()}
        for label in self.every_label:
            sums[f"right_{label}"] = ((found_B == label) & (wanted_B == label)).sum()
            sums[f"found_{label}"] = (found_B == label).sum()
            sums[f"wanted_{label}"] = (wanted_B == label).sum()
        return sums

    def evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """Accuracy, macro F1 (the mean over the labels that occur, among what is found or what is wanted) and loss."""
        sums = evaluator.sums(self.heldout, self.collate, self.measure)
        tallies = [
            Tally(*(sums[f"{name}_{label}"] for name in ("right", "found", "wanted"))) for label in self.every_label
        ]
        occurring = [tally for tally in tallies if tally.found or tally.wanted]
        return {
            "heldout_accuracy": sum(tally.right for tally in tallies) / len(self.heldout),
            "heldout_macro_f1": sum(tally.f1 for tally in occurring) / len(occurring),
            "heldout_loss": sums["loss"] / max(1.0, sums["known"]),
        }


def baselines(train_labels: Sequence[str], heldout_labels: Sequence[str]) -> dict[str, float]:
    """Accuracy of the label that is most frequent in training, and the one expected of drawing labels evenly."""
    counts = Counter(train_labels)
    majority = min(counts, key=lambda label: (-counts[label], label))
    known = sum(label in counts for label in heldout_labels)
    return {
        "heldout_accuracy_majority": heldout_labels.count(majority) / len(heldout_labels),
        "heldout_accuracy_random": known / len(heldout_labels) / len(counts),
    }
