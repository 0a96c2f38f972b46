"""A model's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
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


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of the part that reads text: of a model that reads other things too, a config within it."""
    return dict(config.get("text_config", config))


def hidden_size(config: Mapping[str, Any]) -> Any:
    inner = text_config(config)
    return next(inner[name] for name in ("hidden_size", "n_embd", "d_model") if name in inner)
