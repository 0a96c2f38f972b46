"""What the outputs of a classifier or an extractor are called, as its `config.json` says; `plan` reads it too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.errors import ArtifactError, DataError, Problem

SEVERAL_LABELS = ("multi_label_classification", "regression")
UNNAMED = 2
"""How many outputs transformers gives a config that names none: `LABEL_0` and `LABEL_1`."""


def label_names(config: Mapping[str, Any], where: str) -> list[str]:
    """The names by number. Raises `ArtifactError` if it gives several labels to one text, or names its outputs in no order."""
    if (problem := config.get("problem_type")) in SEVERAL_LABELS:
        what = f"is for {problem}, and rows have one label each"
        raise ArtifactError(Problem(where, what, "Name a classifier whose classes exclude each other."))
    named = config.get("id2label") or {}
    by_number = {str(number): str(name) for number, name in named.items()}
    numbers = [str(number) for number in range(len(by_number) or int(config.get("num_labels") or UNNAMED))]
    if not by_number:
        return [f"LABEL_{number}" for number in numbers]
    twice = [name for name, count in Counter(by_number.values()).items() if count > 1]
    if set(by_number) != set(numbers) or twice:
        what = f"calls two outputs {twice[0]!r}" if twice else f"numbers its outputs {', '.join(by_number)}"
        hint = f"Give each of its {len(by_number)} outputs, from 0, a name of its own in the config's `id2label`."
        raise ArtifactError(Problem(where, what, hint))
    return [by_number[number] for number in numbers]


def span_tags(config: Mapping[str, Any], where: str) -> tuple[list[str], list[int | None]]:
    """The labels of an extractor, and for each of our tags O, B-x, I-x, ... the number of its own (None: it has none).

    Raises `ArtifactError` for tags of another scheme.
    """
    tags = {tag: number for number, tag in enumerate(label_names(config, where))}
    labels = sorted(tag[2:] for tag in tags if tag.startswith("B-"))
    known = {"O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")}
    if odd := sorted(set(tags) - known) or ([] if "O" in tags else ["no O"]):
        what = f"does not tag with O, B-x and I-x: {', '.join(odd[:5])}"
        raise ArtifactError(Problem(where, what, "Save it with `id2label` of that scheme."))
    return labels, [tags["O"], *(tags.get(f"{prefix}-{label}") for label in labels for prefix in "BI")]


def require_common_labels(trained: Collection[str], heldout: Collection[str], where: str) -> None:
    """Raises `DataError` if held-out rows have labels and training knows none of them: every figure would be 0."""
    if not heldout or set(heldout) & set(trained):
        return
    shown = {
        side: ", ".join(map(repr, sorted(set(names))[:5])) for side, names in (("heldout", heldout), ("train", trained))
    }
    what = f"no held-out row has a label that training knows: held out are {shown['heldout']}, and in training {shown['train']}"
    hint = (
        "Write the labels alike on both sides; or take the held-out source out of `mix`, which then holds out some of the "
        "other rows (heldout_fraction)."
    )
    raise DataError(Problem(where, what, hint))
