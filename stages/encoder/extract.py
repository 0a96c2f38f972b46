"""An extractor of spans: an encoder under a linear head that tags each token, trained on texts with labelled spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.encoding.params import check_encoder_task, estimate_encoder_task
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from stages.lib.encoding.extraction import TaggedText


class ExtractParams(TrainingParams):
    """How the extractor is trained. One row is one window of a text; most texts have one."""

    max_length_tokens: int = Field(default=256, ge=8)
    """Tokens per window, special ones included. A longer text is read in several windows."""
    stride_tokens: int = Field(default=64, ge=0)
    """Tokens that neighbouring windows of a text share. The window that sees more around it decides."""

    @model_validator(mode="after")
    def windows_move_on(self) -> ExtractParams:
        if 2 * self.stride_tokens >= self.max_length_tokens:
            raise ValueError(
                f"stride_tokens {self.stride_tokens} must be below half of max_length_tokens {self.max_length_tokens}"
            )
        return self


def run(ctx: Context, params: ExtractParams) -> Result:
    from transformers import AutoModelForTokenClassification

    from stages.lib.encoding.encoders import facts_of
    from stages.lib.encoding.extraction import Extraction, TaggingObjective, read_text, training_windows
    from stages.lib.encoding.tagging import tag_names
    from stages.lib.models.heads import add_head
    from stages.lib.models.lengths import require_length
    from stages.lib.models.loading import initial_weights, load_model
    from stages.lib.rows.canonical import read_rows
    from stages.lib.text.frames import open_tokenizer, require_frame
    from stages.lib.training.loop import train

    encoder = ctx.inputs["encoder"]
    require_length(encoder, params.max_length_tokens)
    tokenizer = open_tokenizer(encoder, params.max_length_tokens)
    frame = require_frame(tokenizer, pair=False)
    train_rows = list(read_rows(ctx.inputs["spans"] / "train.jsonl"))
    heldout_rows = list(read_rows(ctx.inputs["spans"] / "heldout.jsonl"))

    labels = sorted({span["label"] for row in train_rows for span in row["spans"]})
    if not labels:
        raise DataError(Problem("training rows", "hold no span", "There is nothing to learn to extract."))
    shape = (params.max_length_tokens, params.stride_tokens)
    train_texts = [read_text(row, tokenizer, frame, labels, *shape) for row in train_rows]
    task = Extraction(tokenizer, labels, [read_text(row, tokenizer, frame, labels, *shape) for row in heldout_rows])
    windows = [window for text in train_texts for window in training_windows(text)]
    counts = {**count_spans(train_texts, "train"), **count_spans(task.heldout, "heldout")}
    said = ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in counts.items())
    ctx.journal.note(f"{len(labels)} labels; {len(train_texts):,} training texts in {len(windows):,} windows; {said}")

    names = tag_names(labels)
    initial = initial_weights(
        ctx,
        lambda: add_head(
            AutoModelForTokenClassification,
            encoder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        ),
    )
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForTokenClassification, initial),
        tokenizer=tokenizer,
        data=windows,
        collate=task.collate,
        objective=TaggingObjective(),
        evaluate=task.evaluate,
    )
    facts = facts_of(
        tokenizer,
        head_type="token_classification",
        max_length_tokens=params.max_length_tokens,
        precision=params.precision,
        parameters=trained.parameters,
        labels=labels,
        train_rows=len(train_rows),
        heldout_rows=len(heldout_rows),
        optimizer_steps=trained.steps,
    )
    return Result({**trained.after, **task.baselines(train_texts, ctx.seed), **counts}, facts)


STAGE = Stage(
    kind="extract",
    version=1,
    summary="an extractor of spans: an encoder under a linear head that tags each token",
    params=ExtractParams,
    inputs={"encoder": accepts(Kind.ENCODER), "spans": accepts(Kind.SPANS)},
    output=Kind.EXTRACTOR,
    run=run,
    headline=("heldout_f1", "heldout_f1_majority", "heldout_f1_random", "heldout_f1_dictionary"),
    distributed=True,
    estimate=lambda forecast: estimate_encoder_task(forecast, None),
    check=check_encoder_task,
)


def count_spans(texts: Sequence[TaggedText], side: str) -> dict[str, float]:
    """How many spans there are, and how many of them tags cannot say as they stand, by reason."""
    counts = sum((text.counts for text in texts), Counter())
    reasons = {f"{side}_spans_{reason}": float(count) for reason, count in sorted(counts.items())}
    return {f"{side}_spans": float(sum(len(text.spans) for text in texts)), **reasons}
