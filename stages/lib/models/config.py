"""A model's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of the part that reads text: of a model that reads other things too, a config within it."""
    return dict(config.get("text_config", config))


def hidden_size(config: Mapping[str, Any]) -> Any:
    inner = text_config(config)
    return next(inner[name] for name in ("hidden_size", "n_embd", "d_model") if name in inner)
