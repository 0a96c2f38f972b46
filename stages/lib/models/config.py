"""A model's `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, Problem


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(Problem(str(folder / "config.json"), f"cannot be read: {error}")) from None
    return dict(config)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config", config))


def hidden_size(config: dict[str, Any]) -> Any:
    inner = text_config(config)
    return next(inner[name] for name in ("hidden_size", "n_embd", "d_model") if name in inner)
