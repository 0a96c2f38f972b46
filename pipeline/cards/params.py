"""The params of a step as a card shows them: those that the recipe sets otherwise than the stage does, without places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, get_args

from pydantic import BaseModel

from pipeline.errors import cut
from pipeline.settings.strict import models_in

LONGEST_VALUE_CHARACTERS = 200


ELSEWHERE = frozenset({"license"})
"""Params that a card shows in another place."""


def shown_params(
    params: Mapping[str, Any], model: type[BaseModel] | None, source_digests: Mapping[str, str]
) -> list[str]:
    """`name: value` of each param that is not as the stage's own `model` has it; of all of them where there is no model.

    `source_digests` says which params name files from outside: there stands the last part of the name, and the digest.
    """
    named = without_places(params, source_digests)
    chosen = changed(model, named, params) if model else named
    texts = {name: as_text(value) for name, value in chosen.items() if name not in ELSEWHERE}
    return [f"{name}: {text}" for name, text in texts.items()]


def as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    return cut(" ".join(text.split()).replace("`", "'"), LONGEST_VALUE_CHARACTERS)


def without_places(value: Any, digests: Mapping[str, str], path: str = "") -> Any:
    """The value, with the last part of its name and the digest in place of each file or folder from outside."""
    if isinstance(value, Mapping):
        return {
            key: without_places(each, digests, f"{path}.{key}" if path else str(key)) for key, each in value.items()
        }
    if isinstance(value, list):
        return [without_places(each, digests, f"{path}.{index}") for index, each in enumerate(value)]
    if path in digests and isinstance(value, str):
        return f"{PurePath(value).name} ({digests[path].partition(' ')[0][: len('sha256:') + 12]})"
    return value


def changed(model: type[BaseModel], named: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the params `named` whose values as `given` are not the model's defaults, models within them likewise."""
    found = {}
    for name, value in named.items():
        info = model.model_fields.get(name)
        if info is not None and not info.is_required():
            default = info.get_default(call_default_factory=True)
            default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            if given[name] == (str(default) if isinstance(default, PurePath) else default):
                continue
        inner = models_in(info.annotation) if info is not None else []
        found[name] = changed_within(inner, value, given[name])
    return found


def changed_within(models: list[type[BaseModel]], named: Any, given: Any) -> Any:
    """The value of a field whose annotation names `models`: of the one that is meant, only what is not its default."""
    if isinstance(named, list):
        return [changed_within(models, one, other) for one, other in zip(named, given, strict=True)]
    if not isinstance(named, Mapping) or not models:
        return named
    tagged = [m for m in models if "kind" in m.model_fields]
    of_kind = [m for m in tagged if named.get("kind") in get_args(m.model_fields["kind"].annotation)]
    meant = of_kind or [m for m in models if set(named) <= set(m.model_fields)]
    return changed(meant[0], named, given) if meant else named
