"""Extraction of spans by tagging tokens: texts in windows, the loss, and the spans that a model finds.

Shapes: `W` windows, `T` tokens of a window, `N` tokens of a text, `K` tags, `B` texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.tagging import Dictionary, Span, best_tags, random_tags, spans_of, tag_names, tag_spans
from stages.lib.formulas.metrics import Tally, span_metrics, tally
from stages.lib.formulas.token_losses import IGNORE, Tensors
from stages.lib.text.batches import padded
from stages.lib.text.frames import Frame, encode
from stages.lib.text.offsets import Offset
from stages.lib.text.windows import TextWindow, evaluation_batch_size, owned, windows_of
from stages.lib.training.evaluating import Evaluator

"""The tag of a position that the loss passes over."""


COUNTS = ("right", "found", "wanted")


@dataclass(frozen=True)
class TaggedText:
    """A text in windows, with its spans, and the tag of each token where its labels are known."""

    text: str
    spans: list[Span]
    offsets: list[Offset]
    tags: list[int]
    windows: list[TextWindow]
    counts: Counter[str]
    """Spans that tags cannot say as they stand, by reason."""


def read_tagged_text(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    labels: Sequence[str],
    max_length: int,
    stride: int,
) -> TaggedText:
    """The row `{text, spans}` cut into windows of at most `max_length` tokens."""
    ids, offsets = encode(tokenizer, row["text"])
    spans = [Span(span["start"], span["end"], span["label"]) for span in row["spans"]]
    tagged = tag_spans(row["text"], spans, offsets, labels)
    windows = windows_of(frame, ids, max_length, stride)
    return TaggedText(row["text"], spans, offsets, tagged.tags, windows, tagged.counts)


def tagging_windows(text: TaggedText) -> Iterator[dict[str, Any]]:
    """`{input_ids, tags}` per window. A token that two windows share has its tag in one of them: it counts once."""
    for window, (start, end) in zip(text.windows, owned(text.windows), strict=True):
        if start == end:
            continue
        tags = [IGNORE] * len(window.ids)
        left = window.first + start - window.start
        tags[left : left + end - start] = text.tags[start:end]
        yield {"input_ids": window.ids, "tags": tags}


class TaggingObjective:
    """Cross entropy per token: `-log softmax(logits)[tag]`."""

    def count(self, batch: Tensors) -> torch.Tensor:
        return (batch["tags"] != IGNORE).sum()

    def loss_sum(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        logits_WTK = call(model, batch).logits.float()
        return cross_entropy(logits_WTK.flatten(0, 1), batch["tags"].flatten(), ignore_index=IGNORE, reduction="sum")


@dataclass(frozen=True)
class Extraction:
    """How windows become tensors, and what is measured on held-out texts."""

    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    """Those of training, which alone have tags."""
    heldout: list[TaggedText]

    def collate(self, rows: list[dict[str, Any]]) -> Tensors:
        """Training windows as tensors of W x T."""
        ids = [row["input_ids"] for row in rows]
        inputs = model_inputs(self.tokenizer, ids, [[0] * len(each) for each in ids])
        return {**inputs, "tags": padded([row["tags"] for row in rows], IGNORE)}

    def collate_texts(self, rows: list[dict[str, Any]]) -> Tensors:
        """All windows of some held-out texts, and which texts these are."""
        windows = [window for row in rows for window in row["text"].windows]
        inputs = model_inputs(self.tokenizer, [w.ids for w in windows], [w.type_ids for w in windows])
        return {**inputs, "texts": torch.tensor([row["position"] for row in rows])}

    @cached_property
    def every_label(self) -> list[str]:
        """The labels of training, and after them those that only held-out texts have: these count as never found."""
        heldout = {span.label for text in self.heldout for span in text.spans}
        return [*self.labels, *sorted(heldout - set(self.labels))]

    def measure(self, model: torch.nn.Module, batch: Tensors) -> Tensors:
        """`right_k`, `found_k` and `wanted_k` per label number k: spans found rightly, found, and there to find."""
        texts = [self.heldout[index] for index in batch["texts"].tolist()]
        tallies = tally_all(found_spans(texts, call(model, batch).logits, self.labels), texts)
        return {
            f"{name}_{number}": torch.tensor(float(getattr(tallies.get(label, Tally()), name)))
            for number, label in enumerate(self.every_label)
            for name in COUNTS
        }

    def evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """F1, precision and recall of exact spans over all labels, and each label's F1."""
        rows = [{"text": text} for text in self.heldout]
        size = evaluation_batch_size(evaluator.batch_size, [len(text.windows) for text in self.heldout])
        sums = evaluator.sums(rows, self.collate_texts, self.measure, batch_size=size)
        tallies = {
            label: Tally(*(sums[f"{name}_{number}"] for name in COUNTS))
            for number, label in enumerate(self.every_label)
        }
        each = {f"heldout_f1_of_{label}": counted.f1 for label, counted in tallies.items()}
        return {**span_metrics(tallies, "heldout_"), **each}

    def baselines(self, training: Sequence[TaggedText], seed: int) -> dict[str, float]:
        """The F1 of the most frequent tag everywhere, of tags drawn as often as in training, and of a dictionary."""
        counts = Counter(tag for text in training for tag in text.tags)
        distribution = [counts[tag] for tag in range(len(tag_names(self.labels)))]
        majority = distribution.index(max(distribution))
        dictionary = Dictionary((text.text, text.spans) for text in training)
        found = {
            "majority": [self.decode(text, [majority] * len(text.offsets)) for text in self.heldout],
            "random": [
                self.decode(text, random_tags(len(text.offsets), distribution, f"{seed}:{index}"))
                for index, text in enumerate(self.heldout)
            ],
            "dictionary": [dictionary.spans(text.text) for text in self.heldout],
        }
        return {
            f"heldout_f1_{name}": sum(tally_all(spans, self.heldout).values(), Tally()).f1
            for name, spans in found.items()
        }

    def decode(self, text: TaggedText, tags: list[int]) -> list[Span]:
        return spans_of(text.text, tags, text.offsets, self.labels)


def tally_all(found: Sequence[Sequence[Span]], texts: Sequence[TaggedText]) -> dict[str, Tally]:
    """Label -> counts of the found spans and the texts' own, over all texts."""
    totals: dict[str, Tally] = {}
    for spans, text in zip(found, texts, strict=True):
        for label, counted in tally(spans, text.spans).items():
            totals[label] = totals.get(label, Tally()) + counted
    return totals


def found_spans(texts: Sequence[TaggedText], logits_WTK: torch.Tensor, labels: Sequence[str]) -> list[list[Span]]:
    """Per text, the spans of its best legal tags. The logits are those of all windows of the texts, in their order.

    Each token is decided by the window that sees most around it; the path runs over the whole text.
    """
    log_probs_WTK = logits_WTK.float().log_softmax(dim=-1).cpu()
    whole = []
    number = 0
    for text in texts:
        parts = []
        for window, (start, end) in zip(text.windows, owned(text.windows), strict=True):
            left = window.first + start - window.start
            parts.append(log_probs_WTK[number, left : left + end - start])
            number += 1
        whole.append(torch.cat(parts).numpy())
    lengths_B = torch.tensor([len(log_probs_NK) for log_probs_NK in whole])
    log_probs_BNK = padded(whole, dtype=np.float32)
    mask_BN = torch.arange(log_probs_BNK.shape[1])[None] < lengths_B[:, None]
    tags_BN = best_tags(log_probs_BNK, mask_BN)
    return [
        spans_of(text.text, tags[: len(text.offsets)], text.offsets, labels)
        for text, tags in zip(texts, tags_BN.tolist(), strict=True)
    ]
