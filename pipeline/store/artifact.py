"""What an artifact is: its kind, its manifest, and how its files are digested and verified."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ArtifactError, Problem
from pipeline.store.numbers import json_text

MANIFEST = "manifest.json"


SCHEMA_VERSION = 1


HASHED_AT_ONCE_BYTES = 1 << 16
"""Small enough that setting it aside costs little for each of the thousands of files that a source may have."""


class Kind(StrEnum):
    """What an artifact holds. A stage's inputs name the kinds they accept."""

    TEXT_ROWS = "text_rows"
    CHAT_ROWS = "chat_rows"
    PREFERENCE_ROWS = "preference_rows"
    LABEL_ROWS = "label_rows"
    SPAN_ROWS = "span_rows"
    QUESTION_ROWS = "question_rows"
    """`*_rows`: cleaned rows of one source, not yet split."""

    TEXT = "text"
    CHATS = "chats"
    PREFERENCES = "preferences"
    LABELS = "labels"
    SPANS = "spans"
    QUESTIONS = "questions"
    """A mixed data set with its training and held-out rows."""

    TOKENIZER = "tokenizer"
    TOKENS = "tokens"
    CAUSAL_LM = "causal_lm"
    ENCODER = "encoder"
    REWARD_MODEL = "reward_model"
    QUANTIZED_LM = "quantized_lm"
    CLASSIFIER = "classifier"
    EXTRACTOR = "extractor"
    READER = "reader"
    REPORT = "report"


class FileEntry(BaseModel):
    """One file of an artifact or checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    size: int
    sha256: str


class Facts(BaseModel):
    """What consumers of an artifact check before they use it. A stage fills in those that apply."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: list[int] | None = None
    vocabulary_size: int | None = None
    max_length_tokens: int | None = None
    head_type: str | None = None
    dtype: str | None = None
    parameters: int | None = None
    labels: list[str] | None = None
    train_rows: int | None = None
    heldout_rows: int | None = None
    train_tokens: int | None = None
    heldout_tokens: int | None = None
    dropped_rows: dict[str, int] | None = None
    optimizer_steps: int | None = None
    fixed_prompt_scores: dict[str, float] | None = None


class Manifest(BaseModel):
    """`manifest.json`: what the artifact is, what it was made from, and what its files must hash to."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    schema_version: int = SCHEMA_VERSION
    artifact_id: str
    artifact_kind: Kind
    stage: str
    stage_version: int
    step: str
    recipe: str
    seed: int
    params: dict[str, Any]
    input_ids: dict[str, str]
    source_digests: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    facts: Facts = Field(default_factory=Facts)
    metrics: dict[str, float] = Field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None
    library_versions: dict[str, str] = Field(default_factory=dict)
    created_at: str
    wall_seconds: float
    device: str
    world_size: int

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`. Raises `ArtifactError` if there is none, or it cannot be read."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            Problem(str(folder), "is not an artifact: it has no manifest.json", "Name a folder below runs/artifacts/.")
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            Problem(
                str(path), f"cannot be read: {where}: {first['msg']}", "Remove the artifact and run its recipe again."
            )
        ) from None


def canonical_json(value: Any) -> bytes:
    """`value` as JSON that is equal byte for byte whenever the value is equal: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes the file as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json_text(value, path.name, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def digest_file(path: Path | str) -> str:
    """SHA-256 of the file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASHED_AT_ONCE_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, in a fixed order; symbolic links to folders are not followed."""
    for directory, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            yield Path(directory, name)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Relative path -> size and digest of every file below `folder`, leaving out its manifest."""
    entries = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            entries[name] = FileEntry(size=path.stat().st_size, sha256=digest_file(path))
    return entries


def differences(
    folder: Path, files: Mapping[str, FileEntry], *, hashes: bool = True, ignore: frozenset[str] = frozenset()
) -> list[str]:
    """What in `folder` does not match `files`, one sentence each; empty if everything does.

    Sizes are compared first, so that a truncated file costs no hashing; without `hashes` only they are.
    """
    found = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    problems = []
    for name, entry in sorted(files.items()):
        path = found.pop(name, None)
        if path is None:
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry.size:
            problems.append(f"{name} has {size:,} bytes instead of {entry.size:,}")
        elif hashes and digest_file(path) != entry.sha256:
            problems.append(f"{name} has other content than when it was written")
    problems += [f"{name} was added" for name in sorted(found) if name not in ignore | {MANIFEST}]
    return problems
