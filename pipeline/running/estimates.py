"""What is known of an input before it is read: sizes, vocabulary and architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import PathError
from pipeline.settings.paths import read_json
from pipeline.stage import Estimate
from pipeline.store.artifact import Manifest


def estimate_of(manifest: Manifest, folder: Path) -> Estimate:
    """What a finished artifact is known to hold."""
    facts = manifest.facts
    return Estimate(
        parameters=facts.parameters,
        architecture=architecture_of(folder),
        vocabulary_size=facts.vocabulary_size,
        train_rows=facts.train_rows,
        train_tokens=facts.train_tokens,
        sequence_length=facts.max_length_tokens,
        optimizer_steps=facts.optimizer_steps,
        disk_bytes=manifest.total_bytes,
        folder=folder,
    )


def merge(first: Estimate, second: Estimate) -> Estimate:
    """`second` where it knows, else `first`."""
    known = {name: value for name, value in vars(second).items() if value is not None}
    return replace(first, **known)


def architecture_of(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / "config.json")
    except PathError:
        return None
