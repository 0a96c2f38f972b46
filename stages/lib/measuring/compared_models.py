"""Models side by side: what each of them is, and the held-out rows that all of them are measured on.

A row that one of the models cannot use is left out for all, and counted: every measure is over the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem
from pipeline.store.artifact import MANIFEST, Manifest, read_manifest
from stages.lib.formulas.calibration import wins
from stages.lib.measuring.perplexity import (
    ScoredRow,
    document_pieces,
    encode_text_rows,
    heldout_text,
    pair_of_steps,
    pair_rows,
    scored_chat,
)
from stages.lib.models.adapters.folders import adapter_folder, method_in, tokenizer_beside, virtual_tokens_in
from stages.lib.models.adapters.opening import open_adapted
from stages.lib.models.config import read_config
from stages.lib.models.lengths import longest_text, require_length
from stages.lib.models.loading import load_language_model
from stages.lib.preferring.reward_reading import RewardReading, StepsReading
from stages.lib.rows.canonical import Row, read_rows, text_of_message
from stages.lib.text.packed import PackedTokens
from stages.lib.text.tokenizers import chat_template_digest, load_tokenizer, tokenizer_digest

Messages = list[dict[str, str]]


@dataclass
class Subject:
    """A model that is measured, and what was found."""

    name: str
    folder: Path
    """Of the model; of an adapter, that of the model which it was trained on."""
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str
    template_digest: str | None
    context_tokens: int | None
    """How many tokens it reads at once; None if its config sets no limit."""
    reading: RewardReading | StepsReading | None = None
    """Of a reward model, how its outputs become a score; None for a language model."""
    adapter: Path | None = None
    """The folder with the adapter on the model; None where there is none."""
    text: list[ScoredRow] = field(default_factory=list)
    text_tokens: int = 0
    """All tokens of the held-out text in its tokenizer, of which it predicts those that have one before them."""
    chats: list[ScoredRow] = field(default_factory=list)
    pairs: list[tuple[ScoredRow, ScoredRow]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    """`measures`: name -> number; `facts`: name -> what the model is. Of a language model also its `replies` and
    `scored_replies`, one per prompt; of a reward model the `scores` of the latter."""

    @classmethod
    def open(cls, name: str, folder: Path, adapter: Path | None = None) -> Subject:
        tokenizer = load_tokenizer(tokenizer_beside(adapter, folder) if adapter else folder)
        digests = tokenizer_digest(tokenizer), chat_template_digest(tokenizer)
        context, virtual = longest_text(read_config(folder)), virtual_tokens_in(adapter) if adapter else 0
        return cls(name, folder, tokenizer, *digests, None if context is None else context - virtual, adapter=adapter)

    def length(self, otherwise: int = 2**31) -> int:
        return min(self.context_tokens or otherwise, otherwise)

    def load(self, device: str | torch.device) -> Any:
        """The language model in memory, under its adapter if it has one."""
        if self.adapter is None:
            return load_language_model(self.folder, device)
        adapters = {self.name: self.adapter}
        return open_adapted(self.folder, adapters, lambda folder: load_language_model(folder, device)).use(self.name)

    def describe(self) -> dict[str, Any]:
        """What the model is, and what was measured."""
        places = [self.folder] if self.adapter is None else [self.adapter, self.folder]
        manifests = [read_manifest(place) if (place / MANIFEST).exists() else None for place in places]
        weights = places if self.adapter is None else [adapter_folder(self.adapter), self.folder]
        on = {} if self.adapter is None else {"adapter": method_in(self.adapter), "base_id": id_of(manifests[-1])}
        return {
            "artifact_id": id_of(manifests[0]),
            "stage": manifests[0].stage if manifests[0] else None,
            "dtype": manifests[-1].facts.dtype if manifests[-1] else None,
            "bytes": sum(path.stat().st_size for place in weights for path in place.glob("*.safetensors")),
            **on,
            "tokenizer_digest": self.tokenizer_digest,
            "chat_template_digest": self.template_digest,
            **self.results["facts"],
            "measures": self.results["measures"],
        }


def id_of(manifest: Manifest | None) -> str | None:
    return manifest.artifact_id if manifest else None


@dataclass
class Rows:
    """The held-out rows that all models are measured on."""

    text_blocks: int = 0
    text_bytes: int = 0
    chats: list[Messages] = field(default_factory=list)
    chats_left_out: int = 0
    pairs: list[dict[str, Any]] = field(default_factory=list)
    pairs_left_out: int = 0
    baselines: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, dict[str, int]]:
        return {
            "text": {"blocks": self.text_blocks, "bytes": self.text_bytes},
            "chats": {"used": len(self.chats), "left_out": self.chats_left_out},
            "pairs": {"used": len(self.pairs), "left_out": self.pairs_left_out},
        }

    @property
    def chat_bytes(self) -> int:
        """Bytes of what the assistant says."""
        said = (text_of_message(m) for messages in self.chats for m in messages if m["role"] == "assistant")
        return sum(len(text.encode()) for text in said)


def add_text(rows: Rows, tokens: Path, num_blocks: int | None, subjects: Sequence[Subject]) -> None:
    """The first blocks of held-out tokens, and the same text in the tokens of models with another tokenizer."""
    packed, packer = PackedTokens(tokens, "heldout"), load_tokenizer(tokens)
    digest = tokenizer_digest(packer)
    rows.text_blocks = len(packed) if num_blocks is None else min(num_blocks, len(packed))
    if not rows.text_blocks:
        raise DataError(Problem("inputs.tokens", "has no whole block of held-out tokens", "Hold out more in the mix."))
    own, text = document_pieces(packed, rows.text_blocks), heldout_text(packed, packer, rows.text_blocks)
    rows.text_bytes = text.num_bytes
    for subject in subjects:
        if subject.tokenizer_digest != digest:
            subject.text, subject.text_tokens = encode_text_rows(
                subject.tokenizer, text, packed, subject.length(packed.sequence_length)
            )
        else:
            require_length(
                read_config(subject.folder),
                packed.sequence_length + (virtual_tokens_in(subject.adapter) if subject.adapter else 0),
                where=f"inputs.{'adapters' if subject.adapter else 'models'}.{subject.name}",
                what="the blocks of inputs.tokens have {tokens} tokens"
                + ", virtual ones included" * bool(subject.adapter),
                hint="Pack blocks that all models read.",
            )
            subject.text, subject.text_tokens = own, text.num_tokens


def add_chats(rows: Rows, chats: Path, num_chats: int | None, subjects: Sequence[Subject]) -> None:
    """The first held-out chats that every model reads whole."""
    read = list(islice(read_rows(chats / "heldout.jsonl"), num_chats))
    for row in read:
        encoded = [scored_chat(subject.tokenizer, row["messages"], subject.length()) for subject in subjects]
        if all(encoded):
            rows.chats.append(row["messages"])
            for subject, each in zip(subjects, encoded, strict=True):
                subject.chats += each
    rows.chats_left_out = len(read) - len(rows.chats)
    require_rows("inputs.chats", len(read), len(rows.chats))


def add_pairs(rows: Rows, preferences: Path, num_pairs: int | None, subjects: Sequence[Subject]) -> None:
    """The first held-out pairs that every model reads whole and tells apart; and how often the longer answer is chosen."""
    read = list(islice(read_rows(preferences / "heldout.jsonl"), num_pairs))
    for row in read:
        encoded = [pair_of(subject, row) for subject in subjects]
        if all(each is not None for each in encoded):
            rows.pairs.append(row)
            for subject, each in zip(subjects, encoded, strict=True):
                subject.pairs.append(each)
    rows.pairs_left_out = len(read) - len(rows.pairs)
    require_rows("inputs.preferences", len(read), len(rows.pairs))
    lengths_N2 = torch.tensor(
        [[sum(len(m["content"]) for m in row[side]) for side in ("chosen", "rejected")] for row in rows.pairs]
    )
    rows.baselines["heldout_preference_accuracy_longer"] = float(wins(*lengths_N2.unbind(1)).mean())


def reading_of_judge(judge: Subject) -> RewardReading | StepsReading:
    assert judge.reading is not None, "a reward model"
    return judge.reading


def pair_of(subject: Subject, row: Row) -> tuple[ScoredRow, ScoredRow] | None:
    """Both answers with their prompt as the model reads them; None if it cannot."""
    if isinstance(subject.reading, StepsReading):
        return pair_of_steps(subject.tokenizer, row, subject.length(), subject.reading)
    return pair_rows(subject.tokenizer, row, subject.length())


def require_rows(where: str, read: int, kept: int) -> None:
    """Raises `DataError` unless something is left to measure on."""
    if not kept:
        what = f"none of its {read} held-out rows fits all models" if read else "has no held-out rows"
        raise DataError(Problem(where, what, "Hold out more rows, or shorter ones."))


def comparison_notes(subjects: Sequence[Subject], rows: Rows) -> list[str]:
    """Which columns compare with which, and what was left out."""
    notes = []
    for what, measure, key in (
        ("tokenizers", "Perplexity and nats per token compare", "tokenizer_digest"),
        ("chat templates", "Measures of chats and preferences compare", "template_digest"),
    ):
        groups: dict[Any, list[str]] = {}
        for subject in subjects:
            groups.setdefault(getattr(subject, key), []).append(subject.name)
        if len(groups) > 1:
            listed = "; ".join(", ".join(names) for names in groups.values())
            notes.append(f"The models have {len(groups)} different {what}: {measure} only within {listed}.")
            if key == "tokenizer_digest":
                notes.append("Bits per byte compare between all of them, because all read the same text.")
    for left_out, what in ((rows.chats_left_out, "chats"), (rows.pairs_left_out, "pairs")):
        if left_out:
            notes.append(
                f"{left_out} held-out {what} were left out for all models, because one of them cannot use them."
            )
    return notes
