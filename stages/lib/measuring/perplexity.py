"""How well a causal model predicts held-out text: nats per token, perplexity, bits per byte.

B: rows of a batch, T: their tokens, padded. Every measure is a sum of -log p(token | tokens before it) over stated
tokens, divided by their number: what is in a batch together, and what pads it, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import DataError
from stages.lib.formulas.token_losses import IGNORE, next_tokens, token_logps
from stages.lib.models.asking import without_cache
from stages.lib.preferring.reward_models import PLAIN, encode_scored, scores
from stages.lib.preferring.reward_reading import RewardReading, StepsReading
from stages.lib.rows.canonical import Row
from stages.lib.text.batches import attention_mask, padded
from stages.lib.text.chat_fitting import fit_chat, fit_preference
from stages.lib.text.chat_template import Messages
from stages.lib.text.packed import PackedTokens
from stages.lib.text.tokenizers import decode_ids, encode_texts


@dataclass(frozen=True)
class ScoredRow:
    """A sequence of ids, and which of them the model is asked to predict. The first never is: nothing precedes it."""

    ids: Sequence[int]
    asked: Sequence[int | bool] | None = None
    """One flag per id. None: all of them."""


@dataclass(frozen=True)
class Score:
    """`nats`: -log p summed over the predicted tokens. `tokens`: how many those are."""

    nats: float
    tokens: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Nats per token. NaN where there are no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def bits_per_byte(score: Score, tokens: float, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` bytes in `tokens` tokens, at the score's mean. Compares across tokenizers.

    loss x tokens / (bytes x ln 2). The mean over the predicted tokens stands for the few that are not predicted, the
    first of each block.
    """
    return score.loss * tokens / (num_bytes * math.log(2))


@dataclass(frozen=True)
class ScoredBatch:
    """Rows side by side, padded on the right: which of the rows they are, and their tensors, all B x T."""

    indices: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    """0 where there is padding."""
    asked: torch.Tensor
    """1 where the id is asked for."""


def batches_by_length(
    rows: Sequence[ScoredRow], batch_size: int, device: torch.device, padding_id: int = 0
) -> Iterator[ScoredBatch]:
    """All rows, the longest first, so that those of like length share a batch and little is padded."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    for start in range(0, len(rows), batch_size):
        indices = order[start : start + batch_size]
        ids = [rows[index].ids for index in indices]
        asked = [np.ones(len(rows[index].ids)) if rows[index].asked is None else rows[index].asked for index in indices]
        tensors = padded(ids, padding_id), attention_mask(ids), padded(asked)
        yield ScoredBatch(indices, *(tensor.to(device) for tensor in tensors))


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Sequence[ScoredRow], batch_size: int) -> list[Score]:
    """One score per row, in order. Of a batch's logits nothing is kept but the sums."""
    scores = [Score(0.0, 0)] * len(rows)
    for batch in batches_by_length(rows, batch_size, model.device):
        targets_BT = next_tokens(batch.ids, batch.asked)
        logits_BTV = model(input_ids=batch.ids, attention_mask=batch.mask, **without_cache(model)).logits
        nats_B = -token_logps(logits_BTV, targets_BT).double().sum(1)
        tokens_B = (targets_BT != IGNORE).sum(1)
        for index, nats, tokens in zip(batch.indices, nats_B.tolist(), tokens_B.tolist(), strict=True):
            scores[index] = Score(nats, tokens)
    return scores


def score(model: PreTrainedModel, rows: Sequence[ScoredRow], batch_size: int) -> Score:
    """The score of all rows together."""
    return sum(score_rows(model, rows, batch_size), Score(0.0, 0))


@torch.inference_mode()
def reward_rows(
    model: PreTrainedModel,
    rows: Sequence[ScoredRow],
    batch_size: int,
    padding_id: int,
    reading: RewardReading | StepsReading = PLAIN,
) -> list[float]:
    """What a reward model gives each row, in order; one that judges steps is read where a row is `asked`."""
    found = [0.0] * len(rows)
    for batch in batches_by_length(rows, batch_size, model.device, padding_id):
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, "step_ends": batch.asked}
        scores_B = scores(model, given, reading)
        for index, value in zip(batch.indices, scores_B.tolist(), strict=True):
            found[index] = value
    return found


def document_pieces(packed: PackedTokens, num_blocks: int | None = None) -> list[ScoredRow]:
    """What the first `num_blocks` blocks (None: all) hold of each document, as rows of their own.

    A row by itself is what a packed block is to a model whose attention stops at documents' borders: the same tokens
    are predicted, from the same ones before them. Pieces of one token are left out: there is nothing to predict.
    """
    pieces = []
    for index in range(len(packed) if num_blocks is None else num_blocks):
        block = packed.block(index)
        starts = np.flatnonzero(block.position_ids == 0)
        pieces += [ScoredRow(ids) for ids in np.split(block.input_ids, starts[1:]) if len(ids) > 1]
    return pieces


@dataclass(frozen=True)
class HeldoutText:
    """What the first blocks of a split say: the text of each document in them, cut off where the last block ends."""

    texts: list[str]
    num_tokens: int
    """In the tokenizer that packed them, without those that only begin a document."""

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)


def heldout_text(packed: PackedTokens, tokenizer: PreTrainedTokenizerBase, num_blocks: int) -> HeldoutText:
    """The text in the first `num_blocks` blocks; `tokenizer` is the one that packed them."""
    info, end = packed.info, num_blocks * packed.sequence_length
    texts, num_tokens, start = [], 0, 0
    for index in range(packed.num_documents):
        if start >= end:
            break
        ids = packed.document(index)[: end - start]
        start += len(ids)
        if info.bos_token_id is not None and ids[0] == info.bos_token_id:
            ids = ids[1:]
        num_tokens += len(ids)
        if info.eos_token_id is not None and len(ids) and ids[-1] == info.eos_token_id:
            ids = ids[:-1]
        texts.append(decode_ids(tokenizer, ids.tolist()))
    return HeldoutText(texts, num_tokens)


def encode_text_rows(
    tokenizer: PreTrainedTokenizerBase, text: HeldoutText, packed: PackedTokens, length: int
) -> tuple[list[ScoredRow], int]:
    """The same documents in another tokenizer, in rows of at most `length` tokens; and the number of tokens.

    A document begins and ends with this tokenizer's own special tokens where the packed ones did with theirs.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [] if packed.info.bos_token_id is None or bos is None else [bos]
    after = [] if packed.info.eos_token_id is None or eos is None else [eos]
    rows, num_tokens = [], 0
    for ids in encode_texts(tokenizer, text.texts):
        whole = [*before, *ids, *after]
        num_tokens += len(whole) - len(before)
        pieces = [whole[start : start + length] for start in range(0, len(whole), length)]
        rows += [ScoredRow(piece) for piece in pieces if len(piece) > 1]
    return rows, num_tokens


def scored_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length_tokens: int) -> list[ScoredRow]:
    """The whole chat, asked for what the assistant says and where its turns end, in as many sequences as its template needs.

    Empty if it is longer than that, or the template does not take it.
    """
    fitted = fit_chat(tokenizer, messages, max_length_tokens)
    is_whole = not fitted.dropped_messages and not fitted.lost_answers
    return [ScoredRow(*each) for each in fitted.sequences] if is_whole else []


def pair_rows(
    tokenizer: PreTrainedTokenizerBase, row: Row, max_length_tokens: int
) -> tuple[ScoredRow, ScoredRow] | None:
    """The prompt with the chosen and with the rejected answer, asked for the answers alone, their last turn's end included.

    None if one of them is longer than that, or both are the same tokens.
    """
    pair = fit_preference(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length_tokens)
    if pair.chosen is None or pair.rejected is None or pair.dropped_messages:
        return None
    if pair.chosen.input_ids == pair.rejected.input_ids:
        return None
    return ScoredRow(*pair.chosen), ScoredRow(*pair.rejected)


def pair_of_steps(
    tokenizer: PreTrainedTokenizerBase, row: Row, max_length_tokens: int, reading: StepsReading
) -> tuple[ScoredRow, ScoredRow] | None:
    """The prompt with the chosen and with the rejected answer, each taken apart into steps and asked for at their ends.

    None if one of them is longer than that, the template refuses the prompt, both are the same tokens, or an answer calls a tool.
    """
    found = []
    for side in ("chosen", "rejected"):
        if len(row[side]) != 1 or not row[side][0]["content"].strip():
            return None
        try:
            ids, ends = encode_scored(tokenizer, [*row["prompt"], *row[side]], reading)
        except DataError:
            return None
        found.append(ScoredRow(ids, ends))
    chosen, rejected = found
    fit = max(len(chosen.ids), len(rejected.ids)) <= max_length_tokens
    return (chosen, rejected) if fit and chosen.ids != rejected.ids else None
