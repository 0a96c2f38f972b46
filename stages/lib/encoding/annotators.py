"""Which annotator a published model is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import DataError, Problem
from stages.lib.encoding.annotate_answers import AnsweringAnnotator
from stages.lib.encoding.annotate_labels import ClassifyingAnnotator
from stages.lib.encoding.annotate_spans import ExtractingAnnotator
from stages.lib.encoding.annotation import Annotator
from stages.lib.encoding.published import Published
from stages.lib.rows.canonical import Row

ANNOTATORS: dict[str, Callable[[Published, Any, Sequence[Row]], Annotator]] = {
    "ForSequenceClassification": ClassifyingAnnotator,
    "ForTokenClassification": ExtractingAnnotator,
    "ForQuestionAnswering": AnsweringAnnotator,
}
"""How an architecture's name ends -> what it is."""


def open_annotator(published: Published, params: Any, rows: Sequence[Row]) -> Annotator:
    """The annotator for the model. Raises `DataError` or `ArtifactError` if it is not for such rows."""
    for ending, annotator in ANNOTATORS.items():
        if published.architecture.endswith(ending):
            return annotator(published, params, rows)
    what = f"is a {published.architecture or 'model without an architecture'}, which says nothing of rows"
    raise DataError(Problem("inputs.model", what, f"Name one whose architecture ends in {', '.join(ANNOTATORS)}."))
