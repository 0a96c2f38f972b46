"""What an extractor says of texts. Shapes: `W` windows, `T` tokens of a window, `L` tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

from stages.lib.encoding.annotation import DIGITS, Found, Measured
from stages.lib.encoding.encoders import call, model_inputs
from stages.lib.encoding.extraction import (
    TaggedText,
    best_paths,
    extraction_metrics,
    looked_up,
    read_tagged_text,
    span_figures,
    tally_all,
)
from stages.lib.encoding.figures import source_groups
from stages.lib.encoding.published import Published, renamed, require_known
from stages.lib.encoding.tagging import FORBIDDEN, Span, spans_of
from stages.lib.formulas.metrics import Tally
from stages.lib.formulas.token_losses import Tensors
from stages.lib.rows.canonical import Row
from stages.lib.text.frames import frame_as_it_is
from stages.lib.text.offsets import overlapping
from stages.lib.training.evaluating import Metrics


class ExtractingAnnotator:
    """Spans with their labels in each text."""

    auto_class = AutoModelForTokenClassification

    def __init__(self, published: Published, params: Any, rows: Sequence[Row]) -> None:
        self.labels, self.tags = published.spans()
        self.names = dict(zip(self.labels, renamed(self.labels, params.labels), strict=True))
        known = Counter(span["label"] for row in rows if self.is_known(row) for span in row["spans"])
        require_known(known, list(self.names.values()), params.unknown_labels == "count")
        self.tokenizer, self.length = published.tokenizer, published.length(params.max_length_tokens)
        trained = published.trained_with("stride_tokens", min(64, self.length // 4))
        self.stride = trained if params.stride_tokens is None else params.stride_tokens
        self.frame = frame_as_it_is(self.tokenizer, pair=False)

    def read(self, row: Row) -> TaggedText:
        row = {**row, "spans": row.get("spans", [])}
        return read_tagged_text(row, self.tokenizer, self.frame, self.labels, self.length, self.stride)

    def num_windows(self, item: TaggedText) -> int:
        return len(item.windows)

    def num_tokens(self, item: TaggedText) -> int:
        return len(item.windows[0].ids)

    def is_cut(self, item: TaggedText) -> bool:
        return False

    def collate(self, items: Sequence[TaggedText]) -> Tensors:
        windows = [window for item in items for window in item.windows]
        return model_inputs(self.tokenizer, [each.ids for each in windows], [each.type_ids for each in windows])

    def find(self, model: torch.nn.Module, batch: Tensors, items: Sequence[TaggedText]) -> list[Found]:
        """The spans of the best legal tags. A span is as sure as its least probable tag, a text as its least probable one."""
        logits_WTL = call(model, batch).logits.float()
        columns = [
            torch.full_like(logits_WTL[..., 0], FORBIDDEN) if tag is None else logits_WTL[..., tag] for tag in self.tags
        ]
        found = []
        for text, (tags, probs) in zip(items, best_paths(items, torch.stack(columns, dim=-1)), strict=True):
            spans = spans_of(text.text, tags, text.offsets, self.labels)
            places = [overlapping(text.offsets, span.start, span.end) or (0, 0) for span in spans]
            scores = [round(min(probs[first : last + 1]), DIGITS) for first, last in places]
            said = [[span.start, span.end, self.names[span.label]] for span in spans]
            found.append({"spans": said, "scores": scores, "score": round(min(probs, default=1.0), DIGITS)})
        return found

    def annotate(self, row: Row, found: Found) -> Row:
        spans = [{"start": start, "end": end, "label": label} for start, end, label in found["spans"]]
        given = {"given": row["spans"]} if self.is_known(row) else {}
        annotation = {"score": found["score"], "scores": found["scores"], **given}
        return {**row, "spans": spans, "annotation": annotation}

    def summary(self, found: Sequence[Found]) -> Metrics:
        counts = Counter(label for each in found for _, _, label in each["spans"])
        return {f"spans_labelled_{label}": float(counts[label]) for label in sorted(set(self.names.values()))}

    def is_known(self, row: Row) -> bool:
        return "spans" in row

    def measure(self, rows: Sequence[Row], found: Sequence[Found], training: Sequence[Row], seed: int) -> Measured:
        texts = [self.read(row) for row in rows]
        spans = [[Span(*each) for each in one["spans"]] for one in found]
        names = sorted(set(self.names.values()))
        others = sorted({span.label for text in texts for span in text.spans} - set(names))
        tallies = tally_all(spans, texts)
        metrics = extraction_metrics({label: tallies.get(label, Tally()) for label in [*names, *others]})
        unknown = sum(span.label in others for text in texts for span in text.spans)
        counts = {
            "heldout_spans": float(sum(len(text.spans) for text in texts)),
            "heldout_spans_unknown_label": float(unknown),
        }
        dictionary = None
        if training:
            taught = ((row["text"], [Span(**span) for span in row["spans"]]) for row in training)
            dictionary = looked_up(taught, texts)
            metrics["heldout_f1_dictionary"] = sum(tally_all(dictionary, texts).values(), Tally()).f1
        return {**metrics, **counts}, span_figures(texts, source_groups(rows), spans, dictionary)
