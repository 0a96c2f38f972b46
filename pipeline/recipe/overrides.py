"""What `--set a.b=c` changes in a recipe before it is checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pipeline.errors import Problem, RecipeError, did_you_mean, shown
from pipeline.settings.yaml_loader import MOST_LEVELS, parse_yaml


def apply_overrides(
    document: dict[str, Any], overrides: Iterable[str], top_fields: Collection[str], stage_fields: Collection[str]
) -> list[Problem]:
    """Applies each `path=value` to the document, and returns what is wrong with them.

    A path that starts with a stage's name means below that stage: `align.beta=0.2` is `stages.align.params.beta=0.2`.
    A number in it means an item of a list, from 0.
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            problems += apply_override(document, override, top_fields, stage_fields)
        except RecipeError as error:
            problems += [problem for problem in error.problems if isinstance(problem, Problem)]
    return problems


def apply_override(
    document: dict[str, Any], override: str, top_fields: Collection[str], stage_fields: Collection[str]
) -> list[Problem]:
    where = f"--set {shown(override, quoted=False)}"
    target, separator, text = override.partition("=")
    keys = target.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(Problem(where, "is not of the form path=value", "Write --set align.beta=0.2."))
    blocks = document.get("stages")
    stages = blocks if isinstance(blocks, dict) else {}
    if keys[0] not in top_fields:
        if keys[0] not in stages:
            hint = did_you_mean(keys[0], [*stages, *top_fields])
            raise RecipeError(Problem(where, f"the recipe has no stage '{shown(keys[0], quoted=False)}'", hint))
        below = keys[1:] if keys[1:2] and keys[1] in stage_fields else ["params", *keys[1:]]
        keys = ["stages", keys[0], *below]
    value, problems = parse_yaml(text, where)
    put_at(document, keys, value, where)
    return problems


def put_at(document: dict[str, Any], keys: Sequence[str], value: Any, where: str) -> None:
    """Sets what the keys lead to. Raises `RecipeError` where they lead nowhere, or deeper than YAML may be."""
    if len(keys) > MOST_LEVELS or len(keys) + levels_of(value) > MOST_LEVELS:
        what = f"has more than {MOST_LEVELS} lists and mappings within each other"
        raise RecipeError(Problem(where, what, "Write it flatter."))
    place: Any = document
    for position, key in enumerate(keys[:-1]):
        place = step_into(place, key, ".".join(keys[:position]), where)
    put(place, keys[-1], value, ".".join(keys[:-1]), where)


def levels_of(value: Any) -> int:
    """How many lists and mappings stand within each other, where YAML was read: no more than `MOST_LEVELS`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(levels_of, inner), default=0)


def step_into(place: Any, key: str, so_far: str, where: str) -> Any:
    """The mapping or list that `key` names in `place`; one that is not there yet is an empty mapping."""
    if isinstance(place, list):
        return place[index_in(place, key, so_far, where)]
    require_mapping(place, so_far, where)
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def put(place: Any, key: str, value: Any, so_far: str, where: str) -> None:
    if isinstance(place, list):
        place[index_in(place, key, so_far, where)] = value
        return
    require_mapping(place, so_far, where)
    place[key] = value


def require_mapping(place: Any, path: str, where: str) -> None:
    if isinstance(place, dict):
        return
    hint = "Set it as a whole: path={field: value}."
    if isinstance(place, str):
        hint = f"If it is a file, change it there; or set it as a whole: {shown(path, quoted=False)}={{field: value}}."
    raise RecipeError(
        Problem(where, f"'{shown(path, quoted=False)}' is {shown(place)}, and neither a mapping nor a list", hint)
    )


def index_in(items: list[Any], key: str, path: str, where: str) -> int:
    """The position in a list that a key of a path means. Raises `RecipeError` if there is none."""
    if key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(items):
        return int(key)
    what = f"'{shown(path, quoted=False)}' is a list of {len(items)}, and has no item {shown(key)}"
    raise RecipeError(Problem(where, what, "Items count from 0. To add one, set the whole list: path=[...]."))
