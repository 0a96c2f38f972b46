"""An extractor of spans: an encoder under a linear head that tags each token, trained on texts with labelled spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.encoding.label_names import require_common_labels
from stages.lib.encoding.params import check_encoder_task, estimate_encoder_task
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from stages.lib.encoding.extraction import TaggedText


class ExtractParams(TrainingParams):
    """How the extractor is trained. One row is one window of a text; most texts have one."""

    max_length_tokens: int = Field(default=256, ge=8)
    """Tokens per window, special ones included. A longer text is read in several windows."""
    stride_tokens: int = Field(default=64, ge=0)
    """Tokens that neighbouring windows of a text share. The window that sees more around it decides."""

    def measures(self) -> tuple[str, ...]:
        return ("heldout_f1", "heldout_precision", "heldout_recall", "heldout_f1_of_*")

    @model_validator(mode="after")
    def windows_move_on(self) -> ExtractParams:
        if 2 * self.stride_tokens >= self.max_length_tokens:
            raise ValueError(
                f"stride_tokens {self.stride_tokens} must be below half of max_length_tokens {self.max_length_tokens}"
            )
        return self


def run(ctx: Context, params: ExtractParams) -> Result:
    from transformers import AutoModelForTokenClassification

    from stages.lib.encoding.extraction import (
        Extraction,
        TaggingObjective,
        looked_up,
        read_tagged_text,
        span_figures,
        tagging_windows,
    )
    from stages.lib.encoding.figures import source_groups
    from stages.lib.encoding.tagging import Span, tag_names
    from stages.lib.encoding.task import Head, in_words, open_encoder, read_sides, train_task

    tokenizer, frame = open_encoder(ctx, params.max_length_tokens, pair=False)
    train_rows, heldout_rows = read_sides(ctx, "spans")
    labels = sorted({span["label"] for row in train_rows for span in row["spans"]})
    if not labels:
        raise DataError(Problem("training rows", "hold no span", "There is nothing to learn to extract."))
    require_common_labels(labels, {span["label"] for row in heldout_rows for span in row["spans"]}, "inputs.spans")
    train_texts, heldout_texts = (
        [
            read_tagged_text(row, tokenizer, frame, labels, params.max_length_tokens, params.stride_tokens)
            for row in rows
        ]
        for rows in (train_rows, heldout_rows)
    )
    windows = [window for text in train_texts for window in tagging_windows(text)]
    counts = {**count_spans(train_texts, "train"), **count_spans(heldout_texts, "heldout")}
    sides = f"{len(train_texts):,} training texts in {len(windows):,} windows"
    ctx.journal.note(f"{len(labels)} labels; {sides}; {in_words(counts)}")
    task = Extraction(tokenizer, labels, heldout_texts)

    def figures(found: list[Any]) -> dict[str, Any]:
        spans = [[Span(*each) for each in one] for one in found]
        dictionary = looked_up(((text.text, text.spans) for text in train_texts), heldout_texts)
        return span_figures(heldout_texts, source_groups(heldout_rows), spans, dictionary)

    return train_task(
        ctx,
        params,
        tokenizer=tokenizer,
        head=Head(AutoModelForTokenClassification, "token_classification", tag_names(labels), labels),
        task=task,
        objective=TaggingObjective(),
        data=windows,
        max_length_tokens=params.max_length_tokens,
        num_rows=(len(train_rows), len(heldout_rows)),
        baselines=lambda: task.baselines(train_texts, ctx.seed),
        figures=figures,
        counts=counts,
    )


STAGE = Stage(
    kind="extract",
    version=2,
    summary="an extractor of spans: an encoder under a linear head that tags each token",
    params=ExtractParams,
    inputs={
        "encoder": accepts(Kind.ENCODER),
        "spans": accepts(Kind.SPANS),
        "extends": accepts(Kind.EXTRACTOR, optional=True),
    },
    output=Kind.EXTRACTOR,
    run=run,
    headline=("heldout_f1", "heldout_f1_majority", "heldout_f1_random", "heldout_f1_dictionary"),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=lambda forecast: estimate_encoder_task(forecast, None),
    check=check_encoder_task,
)


def count_spans(texts: Sequence[TaggedText], side: str) -> dict[str, float]:
    """How many spans there are, and how many of them tags cannot say as they stand, by reason."""
    counts = sum((text.counts for text in texts), Counter())
    reasons = {f"{side}_spans_{reason}": float(count) for reason, count in sorted(counts.items())}
    return {f"{side}_spans": float(sum(len(text.spans) for text in texts)), **reasons}
