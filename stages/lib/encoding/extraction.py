"""Extraction of spans by tagging tokens: texts in windows, the loss, and the spans that a model finds.

Shapes: `W` windows, `T` tokens of a window, `N` tokens of a text, `K` tags, `B` texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.figures import (
    PER_LENGTH,
    PER_SOURCE,
    as_figures,
    confusion,
    figures_of_groups,
    length_groups,
)
from stages.lib.encoding.found import keep_found
from stages.lib.encoding.tagging import Dictionary, Span, best_tags, random_tags, spans_of, tag_names, tag_spans
from stages.lib.formulas.metrics import Tally, span_metrics, tally
from stages.lib.formulas.token_losses import IGNORE, Tensors
from stages.lib.text.batches import padded
from stages.lib.text.frames import Frame, encode
from stages.lib.text.offsets import Offset
from stages.lib.text.windows import TextWindow, evaluation_batch_size, owned, windows_of
from stages.lib.training.evaluating import Evaluator

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
    """`{input_ids, token_type_ids, tags}` per window. A token that two windows share has its tag in one of them: it counts once."""
    for window, (start, end) in zip(text.windows, owned(text.windows), strict=True):
        if start == end:
            continue
        tags = [IGNORE] * len(window.ids)
        left = window.first + start - window.start
        tags[left : left + end - start] = text.tags[start:end]
        yield {"input_ids": window.ids, "token_type_ids": window.type_ids, "tags": tags}


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
    found: dict[int, list[Span]] = field(default_factory=dict)
    """The spans found in each held-out text that this process measured last."""

    def collate(self, rows: list[dict[str, Any]]) -> Tensors:
        """Training windows as tensors of W x T."""
        ids = [row["input_ids"] for row in rows]
        inputs = model_inputs(self.tokenizer, ids, [row["token_type_ids"] for row in rows])
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
        indices = batch["texts"].tolist()
        texts = [self.heldout[index] for index in indices]
        found = found_spans(texts, call(model, batch).logits, self.labels)
        self.found.update(zip(indices, found, strict=True))
        tallies = tally_all(found, texts)
        return {
            f"{name}_{number}": torch.tensor(float(getattr(tallies.get(label, Tally()), name)))
            for number, label in enumerate(self.every_label)
            for name in COUNTS
        }

    def evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """F1, precision and recall of exact spans over all labels, and each label's F1."""
        self.found.clear()
        rows = [{"text": text} for text in self.heldout]
        size = evaluation_batch_size(evaluator.batch_size, [len(text.windows) for text in self.heldout])
        sums = evaluator.sums(rows, self.collate_texts, self.measure, batch_size=size)
        as_lists = {number: [astuple(span) for span in spans] for number, spans in self.found.items()}
        keep_found(evaluator.ctx, as_lists, len(self.heldout))
        tallies = {
            label: Tally(*(sums[f"{name}_{number}"] for name in COUNTS))
            for number, label in enumerate(self.every_label)
        }
        return extraction_metrics(tallies)

    def baselines(self, training: Sequence[TaggedText], seed: int) -> dict[str, float]:
        """The F1 of the most frequent tag everywhere, of tags drawn as often as in training, and of a dictionary."""
        counts = Counter(tag for text in training for tag in text.tags)
        distribution = [counts[tag] for tag in range(len(tag_names(self.labels)))]
        majority = distribution.index(max(distribution))
        found = {
            "majority": [self.decode(text, [majority] * len(text.offsets)) for text in self.heldout],
            "random": [
                self.decode(text, random_tags(len(text.offsets), distribution, f"{seed}:{index}"))
                for index, text in enumerate(self.heldout)
            ],
            "dictionary": looked_up(((text.text, text.spans) for text in training), self.heldout),
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


def extraction_metrics(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """F1, precision and recall of exact spans over all labels, and each label's F1."""
    each = {f"heldout_f1_of_{label}": counted.f1 for label, counted in tallies.items()}
    return {**span_metrics(tallies, "heldout_"), **each}


def looked_up(training: Iterable[tuple[str, Sequence[Span]]], texts: Sequence[TaggedText]) -> list[list[Span]]:
    """The spans that a dictionary of the words of training texts, given with their spans, finds in each text."""
    dictionary = Dictionary(training)
    return [dictionary.spans(text.text) for text in texts]


OTHER_BORDERS = "(other borders)"
"""Instead of a label: something was found where the span is, and not the span."""


NOTHING = "(nothing)"


def confused(found: Sequence[Span], wanted: Sequence[Span]) -> Iterator[tuple[str, str]]:
    """(label wanted, label found) of each span of a text, and of each that was found where there is none."""

    def meets(one: Span, others: Sequence[Span]) -> bool:
        return any(one.start < other.end and other.start < one.end for other in others)

    labels = {(span.start, span.end): span.label for span in found}
    for span in wanted:
        otherwise = OTHER_BORDERS if meets(span, found) else NOTHING
        yield span.label, labels.get((span.start, span.end), otherwise)
    for span in found:
        if not meets(span, wanted):
            yield NOTHING, span.label


def span_figures(
    texts: Sequence[TaggedText],
    sources: Sequence[str],
    found: Sequence[Sequence[Span]],
    dictionary: Sequence[Sequence[Span]] | None = None,
) -> dict[str, Any]:
    """What the spans found in each text come to: per label (beside the F1 of the `dictionary`'s spans), which is taken for
    which, and by the texts' source and length.
    """
    tallies = tally_all(found, texts)
    beside = tally_all(dictionary, texts) if dictionary is not None else {}
    pairs = [pair for spans, text in zip(found, texts, strict=True) for pair in confused(spans, text.spans)]

    def of_texts(indices: Sequence[int]) -> dict[str, float]:
        some = tally_all([found[index] for index in indices], [texts[index] for index in indices])
        return {"rows": len(indices), **as_figures(sum(some.values(), Tally()))}

    groups = {PER_SOURCE: sources, PER_LENGTH: length_groups([len(text.offsets) for text in texts])}
    return {
        "rows": len(texts),
        "per_label": {
            label: {
                **as_figures(tallies[label]),
                **({"f1_dictionary": beside.get(label, Tally()).f1} if dictionary is not None else {}),
            }
            for label in sorted(tallies)
        },
        "confusion_matrix": confusion(pairs),
        **figures_of_groups(groups, of_texts),
    }


def best_paths(texts: Sequence[TaggedText], logits_WTK: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """Per text, its best legal tags, and how probable the model finds each of them. The logits are those of all windows of
    the texts, in their order.

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
    probs_BN = log_probs_BNK.gather(2, tags_BN[:, :, None]).squeeze(2).exp()
    return [
        (tags[: len(text.offsets)], probs[: len(text.offsets)])
        for text, tags, probs in zip(texts, tags_BN.tolist(), probs_BN.tolist(), strict=True)
    ]


def found_spans(texts: Sequence[TaggedText], logits_WTK: torch.Tensor, labels: Sequence[str]) -> list[list[Span]]:
    """Per text, the spans of its best legal tags: see `best_paths`."""
    paths = best_paths(texts, logits_WTK)
    return [spans_of(text.text, tags, text.offsets, labels) for text, (tags, _) in zip(texts, paths, strict=True)]
