"""A classifier of texts: an encoder under a linear head, trained on labelled texts.

What stands for a whole text is the architecture's to say: its first token (BERT), or the mean of its tokens (ModernBERT
with `classifier_pooling: mean` in the config that it is pretrained with). A small encoder that has only ever filled gaps
learns much faster with the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.encoding.params import check_encoder_task, estimate_encoder_task
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from stages.lib.text.frames import Frame


class ClassifyParams(TrainingParams):
    """How the classifier is trained. One row is one text."""

    max_length_tokens: int = Field(default=256, ge=8)
    """Tokens per text, special ones included. What is longer loses its end, and is counted."""


def run(ctx: Context, params: ClassifyParams) -> Result:
    from transformers import AutoModelForSequenceClassification

    from stages.lib.encoding.classification import Classification, ClassificationObjective, baselines
    from stages.lib.encoding.task import Head, in_words, open_encoder, read_sides, train_task

    tokenizer, frame = open_encoder(ctx, params.max_length_tokens, pair=False)
    train_rows, heldout_rows = read_sides(ctx, "labels")
    train_labels, heldout_labels = ([row["label"] for row in rows] for rows in (train_rows, heldout_rows))
    labels = require_labels(train_labels)
    # Labels that training never saw come after those it did: nothing is ever predicted to be one of them.
    unseen = sorted(set(heldout_labels) - set(labels))
    numbers = {label: number for number, label in enumerate([*labels, *unseen])}
    train_texts, train_cut = encode_rows(train_rows, tokenizer, frame, params.max_length_tokens, numbers)
    heldout_texts, heldout_cut = encode_rows(heldout_rows, tokenizer, frame, params.max_length_tokens, numbers)
    counts = {
        "train_rows_truncated": float(train_cut),
        "heldout_rows_truncated": float(heldout_cut),
        "heldout_rows_with_unseen_label": float(sum(label in unseen for label in heldout_labels)),
    }
    sides = f"{len(train_rows):,} training and {len(heldout_rows):,} held-out rows"
    ctx.journal.note(f"{len(labels)} labels; {sides}; {in_words(counts)}")
    one_of_them = {"problem_type": "single_label_classification"}
    return train_task(
        ctx,
        params,
        tokenizer=tokenizer,
        head=Head(AutoModelForSequenceClassification, "sequence_classification", labels, labels, one_of_them),
        task=Classification(tokenizer, len(labels), heldout_texts),
        objective=ClassificationObjective(),
        data=train_texts,
        max_length_tokens=params.max_length_tokens,
        num_rows=(len(train_rows), len(heldout_rows)),
        baselines=lambda: baselines(train_labels, heldout_labels),
        counts=counts,
    )


STAGE = Stage(
    kind="classify",
    version=2,
    summary="a classifier of texts: an encoder under a linear head",
    params=ClassifyParams,
    inputs={"encoder": accepts(Kind.ENCODER), "labels": accepts(Kind.LABELS)},
    output=Kind.CLASSIFIER,
    run=run,
    headline=("heldout_accuracy", "heldout_accuracy_majority", "heldout_accuracy_random", "heldout_macro_f1"),
    distributed=True,
    estimate=lambda forecast: estimate_encoder_task(forecast, "labels"),
    check=check_encoder_task,
)


def require_labels(found: Iterable[str]) -> list[str]:
    """The different labels, sorted. Raises `DataError` if there are not two of them."""
    labels = sorted(set(found))
    if len(labels) < 2:
        what = f"have no label but {labels[0]!r}" if labels else "there are none"
        raise DataError(Problem("training rows", what, "A classifier needs at least two labels."))
    return labels


def encode_rows(
    rows: list[dict], tokenizer: Any, frame: Frame, max_length: int, numbers: dict[str, int]
) -> tuple[list[dict[str, Any]], int]:
    """`{input_ids, label}` of each row, cut to `max_length` tokens with the special ones, and how many rows were cut."""
    from stages.lib.text.frames import encode

    room = max_length - len(frame)
    texts, num_cut = [], 0
    for row in rows:
        ids, _ = encode(tokenizer, row["text"])
        num_cut += len(ids) > room
        texts.append({"input_ids": [*frame.before, *ids[:room], *frame.after], "label": numbers[row["label"]]})
    return texts, num_cut
