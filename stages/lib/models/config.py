"""A model's `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, PathError
from pipeline.settings.paths import read_json


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`."""
    try:
        return read_json(folder / "config.json")
    except PathError as error:
        raise ArtifactError(*error.problems) from None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config", config))


def hidden_size(config: dict[str, Any]) -> Any:
    inner = text_config(config)
    return next(inner[name] for name in ("hidden_size", "n_embd", "d_model") if name in inner)
