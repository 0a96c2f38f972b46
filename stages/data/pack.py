"""`pack`: documents as one flat array of token ids on disk, which training maps and reads block by block.

Tokenizing is done here, once, on one CPU process, so that nobody waits for it in a training job. Documents keep their
order and their borders; see `stages/lib/text/packed.py` for the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import DataError, Preempted, Problem
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.lengths import length_problems
from stages.lib.rows.canonical import read_rows
from stages.lib.text.tokenizers import copy_tokenizer, encode_texts, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.text.packed import PackedTokens, Split, TokensWriter


class PackParams(Strict):
    """How documents become blocks of tokens."""

    sequence_length: int = Field(ge=2)
    """Length of a training block, in tokens."""
    add_bos: bool = True
    """Whether each document begins with the tokenizer's bos token."""
    add_eos: bool = True
    """Whether each document ends with the tokenizer's eos token."""


def estimate(forecast: Forecast) -> Estimate:
    tokenizer = forecast.inputs.get("tokenizer", Estimate())
    text = forecast.inputs.get("text", Estimate())
    return Estimate(
        sequence_length=forecast.params.sequence_length,
        vocabulary_size=tokenizer.vocabulary_size,
        train_rows=text.train_rows,
    )


def check(forecast: Forecast) -> list[Problem]:
    architecture = forecast.inputs.get("tokenizer", Estimate()).architecture or {}
    return length_problems(architecture, forecast.params.sequence_length, where="params.sequence_length")


def run(ctx: Context, params: PackParams) -> Result:
    from stages.lib.text.packed import INFO, PackedTokens, TokensInfo, TokensWriter, dtype_for

    known = copy_tokenizer(ctx.inputs["tokenizer"], ctx.out / "tokenizer")
    tokenizer = load_tokenizer(ctx.out / "tokenizer")
    before, after = frame(tokenizer, params)

    splits: tuple[Split, ...] = ("train", "heldout")
    counts = {}
    for split in splits:
        with TokensWriter(ctx.out, split, known["vocabulary_size"]) as writer:
            counts[split] = write(ctx, split, tokenizer, writer, before, after)
    info = TokensInfo(
        dtype=dtype_for(known["vocabulary_size"]),
        sequence_length=params.sequence_length,
        vocabulary_size=known["vocabulary_size"],
        tokenizer_digest=known["tokenizer_digest"],
        bos_token_id=before[0] if before else None,
        eos_token_id=after[0] if after else None,
        train_tokens=counts["train"].tokens,
        heldout_tokens=counts["heldout"].tokens,
        train_documents=counts["train"].documents,
        heldout_documents=counts["heldout"].documents,
    )
    (ctx.out / INFO).write_text(info.model_dump_json(indent=1), encoding="utf-8")

    train, heldout = (PackedTokens(ctx.out, split) for split in splits)
    if problems := [too_small(packed) for packed in (train, heldout) if not len(packed)]:
        raise DataError(*problems)
    return Result(
        metrics={
            "train_tokens": info.train_tokens,
            "heldout_tokens": info.heldout_tokens,
            "train_blocks": len(train),
            "heldout_blocks": len(heldout),
            "documents": info.train_documents + info.heldout_documents,
            "empty_documents": counts["train"].empty + counts["heldout"].empty,
            "dropped_tail_tokens": train.dropped_tail_tokens,
            "heldout_dropped_tail_tokens": heldout.dropped_tail_tokens,
            "characters_per_token": counts["train"].characters / counts["train"].text_tokens,
        },
        facts=Facts(
            **known,
            max_length_tokens=params.sequence_length,
            train_tokens=info.train_tokens,
            heldout_tokens=info.heldout_tokens,
            train_rows=info.train_documents,
            heldout_rows=info.heldout_documents,
        ),
    )


STAGE = Stage(
    kind="pack",
    version=1,
    summary="Tokenizes documents into a flat array on disk, read in blocks, with document borders kept.",
    params=PackParams,
    inputs={
        "text": accepts(Kind.TEXT),
        "tokenizer": accepts(Kind.TOKENIZER, Kind.CAUSAL_LM, Kind.ENCODER),
    },
    output=Kind.TOKENS,
    run=run,
    estimate=estimate,
    check=check,
)

BATCH_CHARACTERS = 1_000_000
"""Text that is tokenized at once: enough to keep all cores busy, little enough for any memory."""


@dataclass
class Counts:
    """What was written of a split. `text_tokens` and `characters` leave bos and eos out."""

    documents: int = 0
    empty: int = 0
    """Documents that were passed over, since they had no token."""
    tokens: int = 0
    text_tokens: int = 0
    characters: int = 0


def frame(tokenizer: PreTrainedTokenizerBase, params: PackParams) -> tuple[list[int], list[int]]:
    """The ids to put before and after each document. Raises `DataError` if the tokenizer lacks one of them."""
    wanted = {"add_bos": (params.add_bos, tokenizer.bos_token_id), "add_eos": (params.add_eos, tokenizer.eos_token_id)}
    problems = [
        Problem(f"params.{name}", f"is true, and the tokenizer has no {name[-3:]} token", f"Set {name}: false.")
        for name, (asked, token) in wanted.items()
        if asked and token is None
    ]
    if problems:
        raise DataError(*problems)
    before, after = ([token] if asked else [] for asked, token in wanted.values())
    return before, after


def write(
    ctx: Context,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    writer: TokensWriter,
    before: list[int],
    after: list[int],
) -> Counts:
    """Writes the documents of one split in their order. Raises `Preempted` if asked to stop: a restart begins anew."""
    path = ctx.inputs["text"] / f"{split}.jsonl"
    counts = Counts()
    with path.open("rb") as file:
        done, total = 0, sum(1 for _ in file)
    for texts in batches(path):
        if ctx.stop_requested():
            raise Preempted
        for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
            # Text cannot produce special tokens, so that each document has bos and eos once, whatever it spells.
            document = [*before, *ids, *after]
            if ids:
                writer.add(document)
                counts.text_tokens += len(ids)
                counts.characters += len(text)
            else:
                counts.empty += 1
        done += len(texts)
        ctx.journal.write("progress", what=f"{split} documents packed", done=done, total=total)
    counts.documents, counts.tokens = writer.documents, writer.tokens
    return counts


def batches(path: Path) -> Iterator[list[str]]:
    """The texts of the rows in order, so many at a time that they have `BATCH_CHARACTERS` or a little more."""
    texts: list[str] = []
    size = 0
    for row in read_rows(path):
        texts.append(row["text"])
        size += len(row["text"])
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def too_small(packed: PackedTokens) -> Problem:
    remedy = {
        "train": "Lower sequence_length, or take more text.",
        "heldout": "Lower sequence_length, or give the mix a larger held-out share.",
    }
    return Problem(
        "params.sequence_length",
        f"is {packed.sequence_length:,}, and the {packed.split} text has only {packed.num_tokens:,} tokens",
        remedy[packed.split],
    )
