"""The stage `annotate`: a classifier, extractor or reader says of rows what it was trained to say.

Rows without labels get them, with scores, and stay rows: later stages mix and train on them. Of rows that have labels, what
they say is kept beside what was found, and both are compared: so a model is measured on other data than its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.errors import ArtifactError, DataError, Problem, RecipeError
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from pipeline.store.durable import write_json
from stages.lib.encoding.label_names import label_names, span_tags
from stages.lib.rows.canonical import FORMATS, Row, read_rows, write_rows
from stages.lib.rows.ledger import Ledger

if TYPE_CHECKING:
    from stages.lib.encoding.annotation import Annotator, Found


class AnnotateParams(Strict):
    """Which rows are read, and what becomes of what the model says."""

    split: Literal["heldout", "train"] | None = None
    """Which side of a mixed data set is read. null: the held-out one; of cleaned rows, which have no sides, all."""
    labels: dict[str, str] = {}
    """What rows call the model's labels: its name -> theirs; what is not named keeps its name. Labels that get one name are one: a classifier's probabilities are added."""
    unknown_labels: Literal["refuse", "count"] = "refuse"
    """What becomes of rows with labels that the model does not know. refuse: the stage names them and stops. count: they are counted, as never found."""
    min_score: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rows of which the model is less sure than this, from 0 to 1, are dropped and counted: what is measured is measured before. Scores: the label's probability; of spans that of the least probable tag in the text; of an answer the product of its first and last token's."""
    max_length_tokens: int | None = Field(default=None, ge=8)
    """Tokens that the model reads at once, special ones included. null: as many as in training, or as it takes."""
    stride_tokens: int | None = Field(default=None, ge=0)
    """Tokens that neighbouring windows of an extractor or a reader share. null: as in training, otherwise 64 or 128, at most a quarter of a window."""
    max_question_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a question that a reader uses. null: as in training, otherwise 64, at most a quarter of a window."""
    max_answer_tokens: int | None = Field(default=None, ge=1)
    """Tokens that an answer of a reader has at most. null: as in training, otherwise 30."""
    null_threshold: float | None = None
    """How much better (in log-probability) "no answer" must score than a reader's best answer for the question to stay unanswered. null: as in training; a reader of another maker answers every question."""


READS: dict[Kind, tuple[str, ...]] = {
    Kind.CLASSIFIER: ("text", "labels"),
    Kind.EXTRACTOR: ("text", "spans"),
    Kind.READER: ("questions",),
}
"""What each sort of model reads; the last of them is what it writes."""


def output_kind(params: AnnotateParams, inputs: Mapping[str, Kind]) -> Kind:
    """The kind of the rows that are written. Raises `RecipeError` if the model is not for such rows."""
    model, rows = inputs["model"], inputs["rows"]
    formats = READS[model]
    known = {kind: name for name in formats for kind in (FORMATS[name].rows_kind, FORMATS[name].mixed_kind)}
    if rows not in known:
        raise RecipeError(f"inputs.rows: a {model} reads {' and '.join(formats)}, and these are {rows}.")
    if params.split is not None and rows == FORMATS[known[rows]].rows_kind:
        raise RecipeError(f"params.split: {rows} have no sides, and all are read. Remove it, or name what `mix` made.")
    return FORMATS[formats[-1]].rows_kind


NAMES = {"ForSequenceClassification": label_names, "ForTokenClassification": span_tags}
"""How the class of a model ends -> what reads the names of its outputs, and refuses those that rows cannot have."""


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong with the names of the model's outputs, where it is there already."""
    model = forecast.inputs.get("model", Estimate())
    config = model.architecture if model.folder and model.architecture else {}
    architecture = str((config.get("architectures") or [""])[0])
    try:
        for ending, names in NAMES.items():
            if architecture.endswith(ending):
                names(config, "inputs.model")
    except ArtifactError as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def run(ctx: Context, params: AnnotateParams) -> Result:
    from stages.lib.encoding.annotating import annotate_all
    from stages.lib.encoding.annotators import open_annotator
    from stages.lib.encoding.published import Published
    from stages.lib.models.loading import load_model
    from stages.lib.processes.collectives import from_main
    from stages.lib.processes.joining import join_processes

    # Nothing is trained: there is no state to divide among processes.
    ctx = replace(ctx, resources=ctx.resources.model_copy(update={"deepspeed": None}))
    device = join_processes(ctx)
    rows, training = read_input(ctx, params)
    published = Published(ctx.inputs["model"])
    annotator = open_annotator(published, params, rows)
    ctx.journal.note(f"{len(rows):,} rows, read by a {published.architecture}")
    model = load_model(annotator.auto_class, published.folder).to(device)
    found = annotate_all(ctx, annotator, model, rows, device)
    return from_main(lambda: write_annotated(ctx, params, annotator, rows, found, training))


STAGE = Stage(
    kind="annotate",
    version=1,
    summary="rows labelled by a classifier, an extractor or a reader, which is measured on those that have labels",
    params=AnnotateParams,
    inputs={
        "model": accepts(Kind.CLASSIFIER, Kind.EXTRACTOR, Kind.READER),
        "rows": accepts(
            *(
                kind
                for name in dict.fromkeys(name for names in READS.values() for name in names)
                for kind in (FORMATS[name].rows_kind, FORMATS[name].mixed_kind)
            )
        ),
    },
    output=output_kind,
    run=run,
    check=check,
    headline=(
        "heldout_accuracy",
        "heldout_accuracy_bag_of_words",
        "heldout_macro_f1",
        "heldout_macro_f1_bag_of_words",
        "heldout_exact_match",
        "heldout_f1",
        "heldout_f1_dictionary",
        "heldout_f1_silent",
        "rows_kept",
        "mean_score",
    ),
    distributed=True,
)


def read_input(ctx: Context, params: AnnotateParams) -> tuple[list[Row], list[Row]]:
    """The rows to read; and, of held-out rows, those of training beside them, which baselines learn from."""
    folder = ctx.inputs["rows"]
    if (folder / "rows.jsonl").exists():
        rows, training = list(read_rows(folder / "rows.jsonl")), []
    else:
        rows = list(read_rows(folder / f"{params.split or 'heldout'}.jsonl"))
        training = list(read_rows(folder / "train.jsonl")) if params.split != "train" else []
    if not rows:
        raise DataError(Problem("inputs.rows", "hold no row", "Look at the ledger of the stage that made them."))
    return rows, training


def write_annotated(
    ctx: Context,
    params: AnnotateParams,
    annotator: Annotator,
    rows: Sequence[Row],
    found: Sequence[Found],
    training: Sequence[Row],
) -> Result:
    """Writes the rows that are sure enough, the ledger, and `figures.json` where there was something to compare with."""
    ledger = Ledger(read=len(rows))
    kept = []
    for row, each in zip(rows, found, strict=True):
        if each["score"] < params.min_score:
            ledger.drop("below_min_score", row.get("text") or row["question"])
        else:
            kept.append(annotator.annotate(row, each))
    ledger.kept = len(kept)
    if not kept:
        best = max(each["score"] for each in found)
        hint = "Lower it."
        raise DataError(
            Problem("params.min_score", f"{params.min_score} is reached by no row; the best has {best}", hint)
        )
    write_rows(ctx.out / "rows.jsonl", kept)
    ledger.write(ctx.out)
    metrics = {
        **measured(ctx, params, annotator, rows, found, training),
        **ledger.metrics(),
        "mean_score": sum(each["score"] for each in found) / len(found),
        "rows_truncated": float(sum(each["is_cut"] for each in found)),
        **annotator.summary(found),
    }
    return Result(metrics, Facts(dropped_rows=dict(sorted(ledger.dropped.items()))))


def measured(
    ctx: Context,
    params: AnnotateParams,
    annotator: Annotator,
    rows: Sequence[Row],
    found: Sequence[Found],
    training: Sequence[Row],
) -> dict[str, float]:
    """What is measured on the rows that say what is to be found; nothing where none does."""
    from stages.lib.encoding.figures import FIGURES

    known = [number for number, row in enumerate(rows) if annotator.is_known(row)]
    unknown = {"rows_without_label": float(len(rows) - len(known))}
    if not known:
        return unknown
    taught = [row for row in training if annotator.is_known(row)]
    metrics, figures = annotator.measure([rows[n] for n in known], [found[n] for n in known], taught, ctx.seed)
    write_json(ctx.out / FIGURES, figures)
    if params.split == "train":
        metrics = {name.replace("heldout_", "train_", 1): value for name, value in metrics.items()}
    return {**metrics, **unknown}
