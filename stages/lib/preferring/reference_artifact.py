"""A reference's log-probabilities as an artifact: made once, and taken by trainings in place of the reference.

    reference.json           what they are of: `ReferenceMade`
    reference_logprobs.npz   float64, -inf nowhere: `train` and `heldout`, N x 2 of pairs and N x 1 of single answers; of those
                             `train_mismatched` and `heldout_mismatched` too, where they were asked for

Whoever takes them says what it would have asked the reference itself: the same model and adapter, the same tokens of every
row, in the same number format. Otherwise they are refused.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Problem, shown_path
from pipeline.stage import Context
from pipeline.store.durable import read_json, replacing, write_json
from stages.lib.preferring.reference import (
    AnsweredRows,
    ReferencePass,
    digest_rows,
    identity_of,
    open_reference,
    require_no_holes,
)
from stages.lib.processes.collectives import from_main
from stages.lib.text.template_date import told_date
from stages.lib.text.tokenizers import chat_template_digest, tokenizer_digest

ROLE = "reference_logprobs"
MADE, LOGPROBS = "reference.json", "reference_logprobs.npz"
Logprobs = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ReferenceMade:
    """What log-probabilities are of."""

    model: str
    """The artifact's id, or a digest of the files, of the model and of the adapter on it."""
    tokenizer: str
    chat_template: str | None
    template_date: str
    max_length_tokens: int
    precision: str
    rounded_weights: bool
    """Whether the weights were held in that number format, as under DeepSpeed, and not the arithmetic alone."""
    tail_weight: float | None
    rows: dict[str, list[Any]]
    """Name -> how many rows, and the digest of all their tokens."""


@dataclass(frozen=True)
class ReferenceQuestion:
    """What a reference is asked: the data sets by name, and how."""

    data: Mapping[str, AnsweredRows]
    tokenizer: PreTrainedTokenizerBase
    home: Path
    """The folder of the tokenizer."""
    max_length_tokens: int
    precision: str
    tail_weight: float | None = None
    what: str = "pairs"
    """What a row is called in messages."""

    def made_of(self, ctx: Context, model: str) -> ReferenceMade:
        """What the answer is of, if this model gives it."""
        return ReferenceMade(
            model=model,
            tokenizer=tokenizer_digest(self.tokenizer),
            chat_template=chat_template_digest(self.tokenizer),
            template_date=told_date().isoformat(),
            max_length_tokens=self.max_length_tokens,
            precision=self.precision,
            rounded_weights=rounds_weights(ctx, self.precision),
            tail_weight=self.tail_weight,
            rows={name: [len(rows), digest_rows("", "", [rows])] for name, rows in self.data.items()},
        )


def rounds_weights(ctx: Context, precision: str) -> bool:
    """Whether this step holds weights in that number format, which is less than float32."""
    return ctx.resources.deepspeed is not None and precision != "fp32"


def ask_reference(ctx: Context, question: ReferenceQuestion) -> Logprobs:
    """Name -> N x S log-probabilities under the reference of a training: those of the input `reference_logprobs` where there
    is one, else what the model says that `open_reference` finds.

    Raises `ArtifactError` where the input is of another model, of other rows, asked in another way, or has holes.
    """
    place = open_reference(ctx, question.home)
    if ROLE in ctx.inputs:
        return read_logprobs(ctx, question, identity_of(place.folder, place.adapter))
    return pass_over(ctx, question, place.folder, place.adapter)


def pass_over(ctx: Context, question: ReferenceQuestion, folder: Path, adapter: Path | None) -> Logprobs:
    """What the model in the folder, with this adapter on it, says of all rows."""
    reference_pass = ReferencePass(
        ctx,
        folder,
        list(question.data.values()),
        question.precision,
        question.tail_weight,
        what=question.what,
        adapter=adapter,
    )
    return dict(zip(question.data, reference_pass.run(question.tokenizer), strict=True))


def write_logprobs(folder: Path, made: ReferenceMade, logprobs: Logprobs) -> None:
    """The files of the artifact."""
    write_json(folder / MADE, asdict(made))
    with replacing(folder / LOGPROBS) as file:
        np.savez(file, **logprobs)


def read_logprobs(ctx: Context, question: ReferenceQuestion, model: str) -> Logprobs:
    """Those of the input, in every process. Raises `ArtifactError`, with all that does not fit."""
    folder = ctx.inputs[ROLE]

    def check() -> ReferenceMade:
        made, asked = read_made(folder), question.made_of(ctx, model)
        if problems := differences_between(made, asked, question.what):
            raise ArtifactError(*problems)
        return made

    made = from_main(check)
    found = read_arrays(folder, question)
    rounded = rounds_weights(ctx, question.precision)
    if made.rounded_weights != rounded:
        how = ("the arithmetic", "the weights, as DeepSpeed does,")
        ctx.journal.note(
            f"the reference's log-probabilities were computed with {how[made.rounded_weights]} rounded to {made.precision},"
            f" and the policy is trained with {how[rounded]} rounded"
        )
    total = sum(len(each) for each in found.values())
    ctx.journal.note(f"reference log-probabilities of {total:,} {question.what} are those of inputs.{ROLE}")
    return found


def read_made(folder: Path) -> ReferenceMade:
    """What the artifact says that its log-probabilities are of."""
    try:
        said = read_json(folder / MADE)
        return ReferenceMade(**{each.name: said[each.name] for each in fields(ReferenceMade)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read: {type(error).__name__}: {error}"
        hint = "Name what a step reference_logprobs made."
        raise ArtifactError(Problem(shown_path(folder / MADE), what, hint)) from None


def read_arrays(folder: Path, question: ReferenceQuestion) -> Logprobs:
    """The log-probabilities that are asked for. Raises `ArtifactError` where any is missing."""
    try:
        with (folder / LOGPROBS).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in question.data}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what = f"cannot be read: {type(error).__name__}: {error}"
        hint = "`slipway verify` tells what is damaged; run its recipe again."
        raise ArtifactError(Problem(shown_path(folder / LOGPROBS), what, hint)) from None
    for name, rows in question.data.items():
        shape = (len(rows), rows.sequence_lengths.shape[1])
        if found[name].shape != shape:
            what = f"its {name} has the shape {found[name].shape} instead of {shape}"
            raise ArtifactError(Problem(shown_path(folder / LOGPROBS), what, "Make it anew."))
        require_no_holes(found[name], folder / LOGPROBS, f"{question.what} of {name}")
    return found


SETTINGS = {
    "max_length_tokens": "params.max_length_tokens",
    "precision": "params.precision",
    "tail_weight": "params.tail_weight",
    "template_date": "params.template_date",
}
"""What both steps say in their params, and where."""


def differences_between(made: ReferenceMade, asked: ReferenceMade, what: str) -> list[Problem]:
    """Why what was made is not what is asked for, each with a way out."""
    where = f"inputs.{ROLE}"
    problems = []
    if made.model != asked.model:
        said = f"is what the model {short(made.model)} says, and the reference here is {short(asked.model)}"
        hint = "Make it of that model (inputs.model, and inputs.adapter where one is trained further), or name the other one as inputs.reference here."
        problems.append(Problem(where, said, hint))
    for name, place in SETTINGS.items():
        ours, theirs = getattr(asked, name), getattr(made, name)
        if ours != theirs:
            problems.append(
                Problem(where, f"was made with {name} {theirs!r}, and here {place} is {ours!r}", "Give both the same.")
            )
    same_template = (made.tokenizer, made.chat_template) == (asked.tokenizer, asked.chat_template)
    same_texts = (made.max_length_tokens, made.template_date) == (asked.max_length_tokens, asked.template_date)
    if not same_template:
        part = "tokenizer" if made.tokenizer != asked.tokenizer else "chat template"
        problems.append(Problem(where, f"was made with another {part}", "Make it of a model that has the policy's."))
    for name, (count, digest) in asked.rows.items():
        if name not in made.rows:
            problems.append(lacking_logprobs(name, made, what))
        elif made.rows[name] != [count, digest] and same_template and same_texts:
            theirs = made.rows[name][0]
            said = f"is of {theirs:,} {name} rows, and the {count:,} here are not the same tokens"
            problems.append(Problem(where, said, other_rows(name)))
    return problems


def lacking_logprobs(name: str, made: ReferenceMade, what: str) -> Problem:
    if name.endswith("_mismatched"):
        said = "has none of mismatched answers, which the loss kto compares with"
        hint = "Make it with mismatched: {global_batch_size: ..., max_steps: ...} as here, or take the loss apo_zero_unpaired."
        return Problem(f"inputs.{ROLE}", said, hint)
    return Problem(f"inputs.{ROLE}", f"has no {name} {what}, only {', '.join(made.rows)}", "Make it of this data set.")


def other_rows(name: str) -> str:
    if name == "train_mismatched":
        return "Give its block mismatched the batch size and the steps or epochs of this step, and both steps the same seed."
    return "Make it of the same data set; for kto from pairs with take_apart: true, and not for dpo."


def short(identity: str) -> str:
    """Of each id or digest the beginning, as folders of artifacts are called."""
    return " with the adapter ".join(part[:8] for part in identity.split())
