"""What an artifact is: its kind, its manifest, and how its files are digested and verified."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ArtifactError, Problem
from pipeline.settings.paths import open_regular
from pipeline.store.durable import read_file

MANIFEST = "manifest.json"


SCHEMA_VERSION = 1


HASHED_AT_ONCE_BYTES = 1 << 16
"""Small enough that setting it aside costs little for each of the thousands of files that a source may have."""


class Kind(StrEnum):
    """What an artifact holds. A stage's inputs name the kinds they accept."""

    TEXT_ROWS = "text_rows"
    CHAT_ROWS = "chat_rows"
    PROMPT_ROWS = "prompt_rows"
    PREFERENCE_ROWS = "preference_rows"
    UNPAIRED_PREFERENCE_ROWS = "unpaired_preference_rows"
    RATING_ROWS = "rating_rows"
    STEP_LABEL_ROWS = "step_label_rows"
    LABEL_ROWS = "label_rows"
    SPAN_ROWS = "span_rows"
    QUESTION_ROWS = "question_rows"
    """`*_rows`: cleaned rows of one source, not yet split."""

    TEXT = "text"
    CHATS = "chats"
    PROMPTS = "prompts"
    PREFERENCES = "preferences"
    UNPAIRED_PREFERENCES = "unpaired_preferences"
    RATINGS = "ratings"
    STEP_LABELS = "step_labels"
    LABELS = "labels"
    SPANS = "spans"
    QUESTIONS = "questions"
    """A mixed data set with its training and held-out rows."""

    TOKENIZER = "tokenizer"
    TOKENS = "tokens"
    CAUSAL_LM = "causal_lm"
    ADAPTER = "adapter"
    """Of peft, without the model that it was trained on."""
    ENCODER = "encoder"
    REWARD_MODEL = "reward_model"
    PROCESS_REWARD_MODEL = "process_reward_model"
    QUANTIZED_LM = "quantized_lm"
    CLASSIFIER = "classifier"
    EXTRACTOR = "extractor"
    READER = "reader"
    REPORT = "report"
    REFERENCE_LOGPROBS = "reference_logprobs"
    """What a model says of the answers of one data set of preferences."""


REWARD_READING = "slipway_reward"
"""The name in a reward model's config.json under which stands how its outputs become a score, where it has more than one."""


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
    attention_kernel: str | None = None
    """How attention was computed: `eager`, `sdpa` or `flash_attention_2` round differently."""
    parameters: int | None = None
    labels: list[str] | None = None
    takes_pairs: bool | None = None
    """Whether a classifier was trained on pairs of texts."""
    train_rows: int | None = None
    heldout_rows: int | None = None
    train_tokens: int | None = None
    heldout_tokens: int | None = None
    dropped_rows: dict[str, int] | None = None
    optimizer_steps: int | None = None
    added_tokens: list[str] | None = None
    """Tokens that the vocabulary gained in this stage, in the order of their ids."""
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
    environment: dict[str, str] = Field(default_factory=dict)
    """What else can change bits: Python, system, processor, GPUs, threads per process."""
    created_at: str
    wall_seconds: float
    device: str
    world_size: int
    seal: str | None = None
    """Digest of everything else in the file as it was committed, so that an edited manifest is known; older ones lack it."""

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def sealed(manifest: Manifest) -> str:
    """The text of `manifest.json`, with its seal."""
    seal = seal_of(manifest.model_dump_json().encode())
    return manifest.model_copy(update={"seal": seal}).model_dump_json(indent=2) + "\n"


def seal_of(data: bytes) -> str:
    """The seal that a manifest with this content has. It does not change with the layout of the text."""
    return digest_bytes(canonical_json({name: value for name, value in json.loads(data).items() if name != "seal"}))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`. Raises `ArtifactError` if there is none, or it cannot be read."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(read_file(path))
    except FileNotFoundError:
        raise ArtifactError(
            Problem(str(folder), "is not an artifact: it has no manifest.json", "Name a folder below runs/artifacts/.")
        ) from None
    except OSError as error:
        hint = "Mend or remove it; its recipe makes the artifact again."
        raise ArtifactError(Problem(str(path), f"cannot be read: {error.strerror or error}", hint)) from None
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


def digest_file(path: Path | str) -> str:
    """SHA-256 of the file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0, opener=open_regular) as file:
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
            entries[name] = FileEntry(size=size_of_file(path), sha256=digest_file(path))
    return entries


def size_of_file(path: Path) -> int:
    """Bytes of a regular file. Raises `ArtifactError` for a pipe, a socket or a link to nothing: reading might never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ArtifactError(Problem(str(path), "is a link to nothing", "Remove it.")) from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(Problem(str(path), "is no regular file", "Remove it."))
    return status.st_size


def differences(
    folder: Path, files: Mapping[str, FileEntry], *, digest: Callable[[Path], str | None] | None = digest_file
) -> list[str]:
    """What of `files` is missing in `folder` or has changed, one sentence each; empty if nothing has: see `changes`."""
    return [f"{name} {what}" for name, what in changes(folder, files, digest=digest).items()]


def changes(
    folder: Path, files: Mapping[str, FileEntry], *, digest: Callable[[Path], str | None] | None
) -> dict[str, str]:
    """Name -> what is wrong with it, for the `files` that are missing in `folder` or have changed.

    Sizes are compared first, so that a truncated file costs no hashing. `digest` says what a file holds, or None where
    that is not to be compared; without it only sizes are. A file that was added changes none of these: see `added`.
    """
    found = {}
    for name, entry in sorted(files.items()):
        path = folder / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                found[name] = "is no regular file"
            elif status.st_size != entry.size:
                found[name] = f"has {status.st_size:,} bytes instead of {entry.size:,}"
            elif digest and digest(path) not in (None, entry.sha256):
                found[name] = "has other content than when it was written"
        except (FileNotFoundError, NotADirectoryError):
            found[name] = "is missing"
        except OSError as error:
            found[name] = f"cannot be read: {error.strerror}"
    return found


READ_SUFFIXES = frozenset(
    ".json .jsonl .jinja .safetensors .bin .pt .pth .model .vocab .py .npy .npz .parquet .arrow .gguf .idx".split()
)
READ_NAMES = frozenset({"vocab.txt", "merges.txt"})


def added(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """The files below `folder` that its list does not name, sorted."""
    found = (path.relative_to(folder).as_posix() for path in files_below(folder))
    return sorted(name for name in found if name not in files and name != MANIFEST)


def would_be_read(name: str) -> bool:
    """Whether loaders may read a file of this name that they find beside an artifact's own.

    An `adapter_config.json`, a second `.safetensors` or a `chat_template.jinja` changes what is loaded without changing any
    file that was there. Hidden files, backups of editors and notes for people do not.
    """
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and (path.suffix in READ_SUFFIXES or path.name in READ_NAMES)


def intruders(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Added files that loaders may read."""
    return [name for name in added(folder, files) if would_be_read(name)]
