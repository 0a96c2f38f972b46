"""A classifier of texts, or of pairs of texts: an encoder under a linear head, trained on labelled rows.

What stands for a whole text is the architecture's to say: its first token (BERT), or the mean of its tokens (ModernBERT
with `classifier_pooling: mean` in the config that it is pretrained with). A small encoder that has only ever filled gaps
learns much faster with the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Result, Stage, accepts
from pipeline.store.artifact import Kind
from stages.lib.encoding.label_names import require_common_labels
from stages.lib.encoding.params import check_encoder_task, estimate_encoder_task
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.encoding.classification import EncodedRow
    from stages.lib.rows.canonical import Row
    from stages.lib.text.frames import Frame


class ClassifyParams(TrainingParams):
    """How the classifier is trained. One row is one text, or one pair of texts."""

    max_length_tokens: int = Field(default=256, ge=8)
    """Tokens per text or pair, special ones included. What is longer loses its end, of a pair the end of the longer text first, and is counted."""

    def measures(self) -> tuple[str, ...]:
        return ("heldout_accuracy", "heldout_macro_f1", "heldout_loss")


def run(ctx: Context, params: ClassifyParams) -> Result:
    from transformers import AutoModelForSequenceClassification

    from stages.lib.encoding.classification import (
        Classification,
        ClassificationObjective,
        Heldout,
        are_pairs,
        classification_row,
        require_labelled,
    )
    from stages.lib.encoding.task import Head, in_words, open_encoder, read_sides, train_task

    train_rows, heldout_rows = read_sides(ctx, "labels")
    require_labelled([*train_rows, *heldout_rows], "inputs.labels")
    pair = are_pairs([*train_rows, *heldout_rows], "inputs.labels")
    tokenizer, frame = open_encoder(ctx, params.max_length_tokens, pair=pair)
    labels = require_labels(row["label"] for row in train_rows)
    require_common_labels(labels, {row["label"] for row in heldout_rows}, "inputs.labels")
    # Labels that training never saw come after those it did: nothing is ever predicted to be one of them.
    unseen = sorted({row["label"] for row in heldout_rows} - set(labels))
    numbers = {label: number for number, label in enumerate([*labels, *unseen])}
    train, heldout = (
        encode_rows(rows, tokenizer, frame, params.max_length_tokens) for rows in (train_rows, heldout_rows)
    )
    train_data, heldout_data = (
        [classification_row(each, numbers[row["label"]]) for each, row in zip(encoded, rows, strict=True)]
        for encoded, rows in ((train, train_rows), (heldout, heldout_rows))
    )
    counts = {
        "train_rows_truncated": float(sum(each.is_cut for each in train)),
        "heldout_rows_truncated": float(sum(each.is_cut for each in heldout)),
        "heldout_rows_with_unseen_label": float(sum(row["label"] in unseen for row in heldout_rows)),
    }
    sides = f"{len(train_rows):,} training and {len(heldout_rows):,} held-out {'pairs' if pair else 'rows'}"
    ctx.journal.note(f"{len(labels)} labels; {sides}; {in_words(counts)}")
    measured = Heldout(train_rows, heldout_rows, list(numbers), [each.num_tokens for each in heldout])
    one_of_them = {"problem_type": "single_label_classification"}
    return train_task(
        ctx,
        params,
        tokenizer=tokenizer,
        head=Head(AutoModelForSequenceClassification, "sequence_classification", labels, labels, one_of_them),
        task=Classification(tokenizer, len(labels), heldout_data),
        objective=ClassificationObjective(),
        data=train_data,
        max_length_tokens=params.max_length_tokens,
        num_rows=(len(train_rows), len(heldout_rows)),
        baselines=measured.baselines,
        figures=measured.figures,
        counts=counts,
        takes_pairs=pair,
    )


STAGE = Stage(
    kind="classify",
    version=2,
    summary="a classifier of texts, or of pairs of texts: an encoder under a linear head",
    params=ClassifyParams,
    inputs={
        "encoder": accepts(Kind.ENCODER),
        "labels": accepts(Kind.LABELS),
        "extends": accepts(Kind.CLASSIFIER, optional=True),
    },
    output=Kind.CLASSIFIER,
    run=run,
    headline=(
        "heldout_accuracy",
        "heldout_accuracy_majority",
        "heldout_accuracy_random",
        "heldout_accuracy_bag_of_words",
        "heldout_macro_f1",
        "heldout_macro_f1_bag_of_words",
    ),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
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
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, frame: Frame, max_length: int
) -> list[EncodedRow]:
    """The texts of each row in their frame, cut to `max_length` tokens with the special ones."""
    from stages.lib.encoding.classification import encode_row_of_texts

    return [encode_row_of_texts(row, tokenizer, frame, max_length) for row in rows]
