"""Single answers as tokens, each called good or bad or rated by attributes, and the micro batches made of them.

N: answers, A: attributes, T: tokens of a padded sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.answers import AnsweredSequence, batch_of_answers
from stages.lib.preferring.opening import Preferences, tokenizer_of_policy
from stages.lib.preferring.pairs import category_name
from stages.lib.preferring.scoring_params import ScoringParams
from stages.lib.processes.collectives import from_main
from stages.lib.processes.joining import join_processes
from stages.lib.rows.canonical import Row, read_rows
from stages.lib.text.batches import Collate
from stages.lib.text.chat_fitting import fit_answers, with_why
from stages.lib.text.tokenized_parts import SHORTENED, TokenizedRow, TokenizedRows, Tokenizing, tokenize_input

UNRATED_HERE = "none_of_the_attributes_rated"
"""The row rates nothing of what is learned."""


class RatedAnswers(Sequence[dict[str, Any]]):
    """Tokenized answers in the order of their file, which stay on disk until a row is asked for.

    A row has `ids`, `answer` (an `AnsweredSequence`) and `target`: A numbers, NaN where there is no rating.
    """

    def __init__(self, tokenized: TokenizedRows, num_targets: int) -> None:
        self.tokenized = tokenized
        columns = [tokenized.columns[f"target_{number}"] for number in range(num_targets)]
        self.target_NA: NDArray[np.float64] = np.stack(columns, axis=1).astype(np.float64)
        self.source_N: NDArray[np.str_] = tokenized.columns["source"]

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        ((ids, answer),) = self.sequences(index)
        return {"ids": ids, "answer": answer, "target": self.target_NA[index]}

    def sequences(self, index: int) -> list[AnsweredSequence]:
        """The one sequence of a row."""
        return self.tokenized.sequences(index)

    def answer_lengths(self) -> NDArray[np.int64]:
        """N: tokens of each answer. Reads everything."""
        return np.asarray([int(row["answer"].sum()) for row in self], dtype=np.int64)

    def last_ids(self) -> set[int]:
        """The ids that sequences end with. Reads everything."""
        return {int(row["ids"][-1]) for row in self}


def targets_of(role: str, attributes: Sequence[str]) -> Callable[[Row], list[float]]:
    """What is learned of a row: whether its answer is good, as 1 and 0; or its rating of each attribute, NaN where there is none."""
    if role == "unpaired_preferences":
        return lambda row: [float(row["label"])]

    def ratings(row: Row) -> list[float]:
        given = [row["ratings"].get(name) for name in attributes]
        return [math.nan if value is None else float(value) for value in given]

    return ratings


def open_rated(ctx: Context, params: ScoringParams, role: str) -> Preferences[RatedAnswers]:
    """The input `role` in tokens: the training answers, the held-out ones, and the ledger of both, written to the artifact.

    Raises `DataError` if answers may be longer than the model takes, its chat template is not fit for training, an
    attribute is not rated in either side, a rating is none of the levels, or too large a share of the rows cannot be used.
    """
    tokenizer, home = tokenizer_of_policy(ctx, params.max_length_tokens)
    if role == "ratings":
        join_processes(ctx)
        from_main(lambda: require_attributes(ctx, params))
    attributes = list(params.attributes) if role == "ratings" else ["good"]
    how = tokenizing_rated(tokenizer, params.max_length_tokens, targets_of(role, attributes), [role, *attributes])
    train, heldout, ledger = tokenize_input(ctx, role, how, params.max_dropped_fraction)
    sides = [RatedAnswers(each, len(attributes)) for each in (train, heldout)]
    missing = {
        name: int(sum(np.isnan(side.target_NA[:, number]).sum() for side in sides))
        for number, name in enumerate(attributes)
    }
    if any(missing.values()):
        told = ", ".join(f"{name} {count:,}" for name, count in missing.items() if count)
        ctx.journal.note(f"ratings that are missing, and are left out of the loss: {told}")
    return Preferences(tokenizer, *sides, ledger, home)


def require_attributes(ctx: Context, params: ScoringParams) -> None:
    """Raises `DataError` unless both sides rate each attribute, by one of the levels where there are levels; notes what is not read."""
    problems, unread = [], Counter[str]()
    for split in ("train", "heldout"):
        path = ctx.inputs["ratings"] / f"{split}.jsonl"
        given, odd = Counter[str](), Counter[float]()
        for row in read_rows(path):
            said = {name: value for name, value in row["ratings"].items() if value is not None}
            given.update(said.keys())
            unread.update(said.keys() - params.attributes.keys())
            if params.rating_levels is not None:
                read = [value for name, value in said.items() if name in params.attributes]
                odd.update(float(value) for value in read if value not in params.rating_levels)
        if lacking := [name for name in params.attributes if not given[name]]:
            known = ", ".join(f"{name} ({count:,})" for name, count in sorted(given.items())) or "none"
            hint = "Name attributes that the rows rate in params.attributes, or hold out more rows in the mix."
            problems.append(Problem(str(path), f"no row rates {', '.join(lacking)}; rated are: {known}", hint))
        if odd:
            shown = ", ".join(f"{value:g} ({count:,})" for value, count in sorted(odd.items())[:8])
            hint = f"Add them to params.rating_levels, which are {params.rating_levels}, or take rating_loss: squared."
            problems.append(Problem(str(path), f"{odd.total():,} ratings are none of the levels: {shown}", hint))
    if problems:
        raise DataError(*problems)
    if unread:
        told = ", ".join(f"{name} ({count:,} ratings)" for name, count in sorted(unread.items()))
        ctx.journal.note(
            f"attributes of the rows that params.attributes does not name, and that are not learned: {told}"
        )


def tokenizing_rated(
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    targets: Callable[[Row], list[float]],
    settings: Sequence[str],
) -> Tokenizing:
    """Answers that have, each with its prompt, at most `max_length_tokens`. A longer prompt loses its oldest turns."""

    def make(row: Row) -> TokenizedRow:
        fitted = fit_answers(tokenizer, row["prompt"], [row["completion"]], max_length_tokens)
        target_A = targets(row)
        reason = fitted.reason or (UNRATED_HERE if all(map(math.isnan, target_A)) else "")
        if reason:
            example = " | ".join(message["content"] for message in [*row["prompt"], *row["completion"]])
            return TokenizedRow(reason=reason, example=with_why(fitted.why, example))
        columns: dict[str, str | float] = {f"target_{number}": value for number, value in enumerate(target_A)}
        columns["source"] = category_name(row.get("source"))
        return TokenizedRow(fitted.answers, columns, repaired={SHORTENED: 1} if fitted.dropped_messages else {})

    return Tokenizing("answers", tokenizer, make, "max_length_tokens", [max_length_tokens, "rated", *settings])


def collate_rated(padding_id: int) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and `answer_mask` of N x T, `target_NA`, and `rated_NA`: false where there is no rating,
    and the target is 0.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        batch = batch_of_answers([(row["ids"], row["answer"]) for row in rows], padding_id)
        target_NA = np.stack([row["target"] for row in rows])
        batch["rated_NA"] = torch.from_numpy(~np.isnan(target_NA))
        batch["target_NA"] = torch.from_numpy(np.nan_to_num(target_NA)).float()
        return batch

    return collate
