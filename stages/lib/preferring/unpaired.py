"""Single answers as tokens, each desirable or not, and the micro batches made of them.

N: answers, M: answers after prompts that are not theirs, T: tokens of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.stage import Context
from stages.lib.formulas.token_losses import Tensors
from stages.lib.preferring.answers import AnsweredSequence, batch_of_answers
from stages.lib.preferring.opening import Preferences, tokenizer_of_policy
from stages.lib.preferring.pairs import EQUAL, category_name
from stages.lib.preferring.unpaired_params import ROLES, UnpairedParams
from stages.lib.rows.canonical import Row, digest_text
from stages.lib.text.batches import Collate
from stages.lib.text.chat_fitting import fit_answers, with_why
from stages.lib.text.tokenized_parts import SHORTENED, TokenizedRow, TokenizedRows, Tokenizing, tokenize_input
from stages.lib.training.scheduling import ScheduledData

MISMATCHED = "mismatched_"
"""How the tensors begin of answers after prompts that are not theirs."""


SPLITS = ("train", "heldout", "train_mismatched", "heldout_mismatched")
"""All that a reference is asked, in this order; of losses without a reference point the first two."""


class Unpaired(Sequence[dict[str, Any]]):
    """Tokenized answers in the order of their file, which stay on disk until a row is asked for.

    A row has `ids` and `answer` (an `AnsweredSequence`), `desirable` and, once it is known, the log-probability under a reference as
    `reference`.
    """

    def __init__(self, tokenized: TokenizedRows, reference_N: NDArray[np.float64] | None = None) -> None:
        self.tokenized = tokenized
        self.reference_N = reference_N
        self.desirable_N: NDArray[np.bool_] = tokenized.columns["desirable"].astype(bool)
        self.source_N: NDArray[np.str_] = tokenized.columns["source"]
        self.prompt_tokens_N: NDArray[np.int64] = tokenized.columns["prompt_tokens"].astype(np.int64)
        self.prompt_N: NDArray[np.int64] = np.unique(tokenized.columns["prompt"], return_inverse=True)[1].reshape(-1)
        """The number of each answer's prompt: equal for answers to the same one."""

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        ((ids, answer),) = self.sequences(index)
        row: dict[str, Any] = {"ids": ids, "answer": answer, "desirable": bool(self.desirable_N[index])}
        return row if self.reference_N is None else {**row, "reference": self.reference_N[index]}

    def sequences(self, index: int) -> list[AnsweredSequence]:
        """The one sequence of a row."""
        return self.tokenized.sequences(index)

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """N x 1: tokens of each prompt with its answer."""
        return self.tokenized.lengths

    def answer_lengths(self) -> NDArray[np.int64]:
        """N: tokens of each answer. Reads everything."""
        return np.asarray([int(row["answer"].sum()) for row in self], dtype=np.int64)

    def with_reference(self, logprobs_N: NDArray[np.float64]) -> Unpaired:
        """The same answers, each with its log-probability under a reference."""
        assert logprobs_N.shape == (len(self),), "one number an answer"
        return Unpaired(self.tokenized, logprobs_N)


class Mismatched(Sequence[AnsweredSequence]):
    """Answers after prompts that are not theirs, by which KTO estimates how far the policy is from the reference.

    Number m is the prompt of row `prompt_M[m]` with the answer of row `answer_M[m]`; one that would be longer than
    `max_length_tokens` loses the answer's end.
    """

    def __init__(
        self,
        rows: Unpaired,
        prompt_M: NDArray[np.int64],
        answer_M: NDArray[np.int64],
        max_length_tokens: int,
        reference_M: NDArray[np.float64] | None = None,
    ) -> None:
        self.rows = rows
        self.prompt_M, self.answer_M = prompt_M, answer_M
        self.max_length_tokens = max_length_tokens
        self.reference_M = reference_M

    def __len__(self) -> int:
        return len(self.prompt_M)

    def __getitem__(self, index: Any) -> AnsweredSequence:
        prompt, answer = int(self.prompt_M[index]), int(self.answer_M[index])
        (((asked, _),), ((said, mask),)) = self.rows.sequences(prompt), self.rows.sequences(answer)
        asked_tokens, begins = int(self.rows.prompt_tokens_N[prompt]), int(self.rows.prompt_tokens_N[answer])
        ids = np.concatenate([asked[:asked_tokens], said[begins:]])[: self.max_length_tokens]
        masks = np.concatenate([np.zeros(asked_tokens, dtype=mask.dtype), mask[begins:]])[: self.max_length_tokens]
        return ids, masks

    def sequences(self, index: int) -> list[AnsweredSequence]:
        """The one sequence of a row."""
        return [self[index]]

    @property
    def whole_lengths(self) -> NDArray[np.int64]:
        """M: tokens before anything is cut."""
        prompt_tokens_N, lengths_N = self.rows.prompt_tokens_N, self.rows.sequence_lengths[:, 0]
        whole: NDArray[np.int64] = prompt_tokens_N[self.prompt_M] + (lengths_N - prompt_tokens_N)[self.answer_M]
        return whole

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """M x 1: tokens of each sequence."""
        return np.minimum(self.whole_lengths, self.max_length_tokens)[:, None]

    @property
    def num_cut(self) -> int:
        return int((self.whole_lengths > self.max_length_tokens).sum())

    @property
    def num_matched(self) -> int:
        """Those that answer their own prompt all the same, because nothing else stood beside them."""
        return int((self.rows.prompt_N[self.prompt_M] == self.rows.prompt_N[self.answer_M]).sum())

    def with_reference(self, logprobs_M: NDArray[np.float64]) -> Mismatched:
        """The same, each with its log-probability under a reference."""
        assert logprobs_M.shape == (len(self),), "one number a sequence"
        return Mismatched(self.rows, self.prompt_M, self.answer_M, self.max_length_tokens, logprobs_M)


def mismatched_in_steps(rows: Unpaired, seed: int, steps: int, step_rows: int, max_length_tokens: int) -> Mismatched:
    """For each position of the training schedule its prompt with the answer of another row of the same step.

    So it is a function of seed and position, like the schedule itself: neither the number of processes nor the micro batch
    changes anything.
    """
    schedule = ScheduledData(rows, seed, steps * step_rows)
    prompt_M = np.fromiter((schedule.index(position) for position in range(len(schedule))), np.int64, len(schedule))
    answers = [other_answers(rows, step) for step in prompt_M.reshape(steps, step_rows)]
    return Mismatched(rows, prompt_M, np.concatenate(answers), max_length_tokens)


def mismatched_among(rows: Unpaired, max_length_tokens: int) -> Mismatched:
    """For each row its prompt with the answer of another row, all of them beside each other."""
    order_N = np.arange(len(rows))
    return Mismatched(rows, order_N, other_answers(rows, order_N), max_length_tokens)


def other_answers(rows: Unpaired, order_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of the rows the next one, cyclically, which answers another prompt; simply the next one where none does.

    KTO (Ethayarajh et al., 2024) shifts the answers of a batch by one. Where answers to the same prompt follow
    each other, as those of a pair that was taken apart may, the next one would be no mismatch.
    """
    prompts = rows.prompt_N[order_N].tolist()
    count, alone = len(prompts), len(set(prompts)) == 1
    found = np.empty_like(order_N)
    for place, prompt in enumerate(prompts):
        further = range(1, 2 if alone else count)
        step = next((k for k in further if prompts[(place + k) % count] != prompt), 1)
        found[place] = order_N[(place + step) % count]
    return found


def open_unpaired(ctx: Context, params: UnpairedParams) -> Preferences[Unpaired]:
    """The input that has the answers, tokenized: those of training, the held-out ones, and the ledger of both, written to the
    artifact.

    Raises `DataError` if answers may be longer than the model takes, its chat template is not fit for training, or too large a
    share of the rows cannot be used.
    """
    tokenizer, home = tokenizer_of_policy(ctx, params.max_length_tokens)
    role = next(role for role in ROLES if role in ctx.inputs)
    how = tokenizing_answers(tokenizer, params.max_length_tokens)
    train, heldout, ledger = tokenize_input(ctx, role, how, params.max_dropped_fraction)
    return Preferences(tokenizer, Unpaired(train), Unpaired(heldout), ledger, home)


def tokenizing_answers(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int) -> Tokenizing:
    """Answers that have, each with its prompt, at most `max_length_tokens`; of a pair both, the chosen one desirable.

    A prompt that is too long loses its oldest turns, for both answers of a pair the same ones.
    """

    def make(row: Row) -> TokenizedRow | list[TokenizedRow]:
        single = "completion" in row
        answers = [row["completion"]] if single else [row["chosen"], row["rejected"]]
        desirable = [bool(row["label"])] if single else [True, False]
        fitted = fit_answers(tokenizer, row["prompt"], answers, max_length_tokens)
        if not fitted.answers or (not single and fitted.answers[0] == fitted.answers[1]):
            example = " | ".join(message["content"] for message in [*row["prompt"], *answers[0]])
            return TokenizedRow(reason=fitted.reason or EQUAL, example=with_why(fitted.why, example))
        shortened = {SHORTENED: 1} if fitted.dropped_messages else {}
        return [
            tokenized_answer(row, encoded, is_good, {} if number else shortened)
            for number, (encoded, is_good) in enumerate(zip(fitted.answers, desirable, strict=True))
        ]

    return Tokenizing("answers", tokenizer, make, "max_length_tokens", [max_length_tokens, "unpaired"])


def tokenized_answer(row: Row, encoded: Any, desirable: bool, repaired: dict[str, int]) -> TokenizedRow:
    ids, mask = encoded
    prompt_tokens = list(mask).index(1)
    columns: dict[str, str | float] = {
        "desirable": float(desirable),
        "source": category_name(row.get("source")),
        "prompt": digest_text(str(list(ids[:prompt_tokens]))).hex(),
        "prompt_tokens": float(prompt_tokens),
    }
    return TokenizedRow([encoded], columns, repaired=repaired)


def collate_unpaired(padding_id: int, mismatched: Mismatched | None) -> Collate:
    """Rows -> `input_ids`, `attention_mask` and `answer_mask` of N x T, `desirable_N` and `reference_N`; and, if the loss
    needs them, the same of the mismatched ones at the rows' positions, but for what is desirable: see `MISMATCHED`.
    """

    def collate(rows: list[dict[str, Any]]) -> Tensors:
        batch = batch_of_answers([(row["ids"], row["answer"]) for row in rows], padding_id)
        batch["desirable_N"] = torch.tensor([row["desirable"] for row in rows])
        batch["reference_N"] = torch.tensor([row["reference"] for row in rows], dtype=torch.float64)
        if mismatched is not None:
            assert mismatched.reference_M is not None
            places = [row["position"] for row in rows]
            others = batch_of_answers([mismatched[place] for place in places], padding_id)
            others["reference_N"] = torch.from_numpy(mismatched.reference_M[places])
            batch |= {f"{MISMATCHED}{name}": tensor for name, tensor in others.items()}
        return batch

    return collate
