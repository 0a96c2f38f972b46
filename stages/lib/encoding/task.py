"""What classifying, extracting and answering share: an encoder opened, a new head put on it and trained, the result told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from pipeline.stage import Context, Result
from pipeline.store.artifact import Facts
from pipeline.store.durable import write_json
from stages.lib.encoding.encoders import match_type_ids
from stages.lib.encoding.figures import FIGURES
from stages.lib.encoding.found import kept_found
from stages.lib.formulas.token_losses import Tensors
from stages.lib.models.config import read_config
from stages.lib.models.heads import add_head
from stages.lib.models.lengths import require_length
from stages.lib.models.loading import initial_weights, load_model
from stages.lib.processes.collectives import from_main
from stages.lib.rows.canonical import Row, read_rows
from stages.lib.text.frames import Frame, open_tokenizer, require_frame
from stages.lib.text.tokenizers import facts_of_tokenizer
from stages.lib.training.carrying import Objective
from stages.lib.training.evaluating import Evaluator, Metrics
from stages.lib.training.loop import train
from stages.lib.training.params import TrainingParams


class Task(Protocol):
    """How rows become tensors, and what is measured on held-out ones."""

    def collate(self, rows: list[dict[str, Any]]) -> Tensors:
        """Training rows as tensors."""

    def evaluate(self, evaluator: Evaluator) -> Metrics:
        """The metrics on held-out rows. What was found in each is kept with `keep_found`."""


@dataclass(frozen=True)
class Head:
    """What is put on the encoder."""

    auto_class: Any
    """The class of transformers that puts it there."""
    head_type: str
    outputs: Sequence[str] = ()
    """What its outputs stand for, by number; none where the class decides."""
    labels: list[str] | None = None
    """What the model tells apart, for those who use it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the model's config."""

    def on(self, encoder: Path) -> Any:
        """The encoder's body under the new, random head."""
        names = {}
        if self.outputs:
            names = {
                "num_labels": len(self.outputs),
                "id2label": dict(enumerate(self.outputs)),
                "label2id": {name: number for number, name in enumerate(self.outputs)},
            }
        return add_head(self.auto_class, encoder, **names, **self.config)


def open_encoder(ctx: Context, max_length_tokens: int, *, pair: bool) -> tuple[PreTrainedTokenizerBase, Frame]:
    """The tokenizer of the input `encoder`, and the special tokens that it puts around a text, or around a pair.

    Raises `DataError` if the encoder takes fewer than `max_length_tokens`.
    """
    encoder = ctx.inputs["encoder"]
    require_length(read_config(encoder), max_length_tokens)
    tokenizer = open_tokenizer(encoder, max_length_tokens)
    if pair:
        match_type_ids(tokenizer, encoder)
    return tokenizer, require_frame(tokenizer, pair=pair)


def read_sides(ctx: Context, role: str) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of the input `role`."""
    train_rows, heldout_rows = (list(read_rows(ctx.inputs[role] / f"{side}.jsonl")) for side in ("train", "heldout"))
    return train_rows, heldout_rows


def in_words(counts: Mapping[str, float]) -> str:
    """The counts in words, for the journal."""
    return ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in counts.items())


def train_task(
    ctx: Context,
    params: TrainingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    task: Task,
    objective: Objective,
    data: Sequence[dict[str, Any]],
    max_length_tokens: int,
    num_rows: tuple[int, int],
    baselines: Callable[[], Metrics],
    figures: Callable[[list[Any]], dict[str, Any]],
    counts: Metrics,
    takes_pairs: bool | None = None,
) -> Result:
    """Trains the input `encoder` under a new head, publishes it to `ctx.out`, and returns what was measured.

    `data` are the training rows as the objective sees them, `num_rows` the texts or questions of either side that they
    are made of. `figures` says of what was found in each held-out row what it comes to: that is written beside the model.
    """
    initial = initial_weights(ctx, lambda: head.on(ctx.inputs["encoder"]))
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(head.auto_class, initial),
        tokenizer=tokenizer,
        data=data,
        collate=task.collate,
        objective=objective,
        evaluate=task.evaluate,
    )

    def write_figures() -> Metrics:
        write_json(ctx.out / FIGURES, figures(kept_found(ctx)))
        return baselines()

    beside = from_main(write_figures)
    of_tokenizer = facts_of_tokenizer(tokenizer)
    of_tokenizer.pop("stop_token_ids")  # where generation stops; nothing is generated here
    facts = Facts(
        **of_tokenizer,
        max_length_tokens=max_length_tokens,
        head_type=head.head_type,
        dtype=trained.dtype,
        labels=head.labels,
        takes_pairs=takes_pairs,
        parameters=trained.parameters,
        train_rows=num_rows[0],
        heldout_rows=num_rows[1],
        optimizer_steps=trained.steps,
    )
    return Result({**trained.after, **beside, **counts}, facts)
