"""A model's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, PathError, Problem, shown
from pipeline.settings.paths import holds_file, read_json

ADAPTER_CONFIG = "adapter_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises `ArtifactError` where there is none, and says so of an adapter alone."""
    if holds_file(folder, ADAPTER_CONFIG) and not holds_file(folder, "config.json"):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        what = f"holds an adapter of {shown(base)} alone, and no model"
        hint = "Make one of the two by a step `merge`, and name that; virtual tokens are read by peft alone."
        raise ArtifactError(Problem(str(folder), what, hint))
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
