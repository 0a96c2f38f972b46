"""What a step will do, and why: reasons that print themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Action(StrEnum):
    SKIP = "skip"
    RESUME = "resume"
    RUN = "run"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Reason:
    """Why a step has its action. Prints itself."""

    made: str | None = None
    """When the artifact was made, for a step that is skipped."""
    same_as: str | None = None
    """The step before it that makes the same artifact, for a step that is skipped because of it."""
    changed: tuple[tuple[str, Any, Any], ...] = ()
    """(param, old, new) since the recipe last ran."""
    changed_inputs: tuple[str, ...] = ()
    version: tuple[int, int] | None = None
    """(old, new) version of the stage."""
    damage: tuple[str, ...] = ()
    """What is wrong with the artifact that was made."""
    checkpoint: tuple[int, int | None] | None = None
    """(step, total steps) of the checkpoint to resume from."""
    verified: bool = True
    converted: str = ""
    """What changes where the checkpoint is of other processes, or of another memory layout."""
    once: str | None = None
    """The name that the step had when it wrote the checkpoint, if it was another."""
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that did not verify."""
    refused: tuple[str, ...] = ()
    """Why the step would be refused when it starts."""
    edited: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(role, files) of inputs by path that carry the manifest of an artifact and are not that artifact."""
    waits_for: tuple[str, ...] = ()
    """Steps whose artifacts are missing, for a step that is blocked."""
    running: str | None = None
    running_here: bool = False
    """Whether that is in the step's own work folder: then it can be waited for."""

    def __str__(self) -> str:
        parts = []
        if self.running:
            parts.append(self.running)
        if self.made:
            parts.append(f"made {self.made}")
        if self.same_as:
            parts.append(f"is the artifact that {self.same_as} makes")
        if self.waits_for:
            parts.append(f"needs {', '.join(self.waits_for)}, which this command does not run")
        if self.checkpoint:
            step, total = self.checkpoint
            of = f" of {total}" if total else ""
            once = f" (as {self.once})" if self.once else ""
            parts.append(f"checkpoint {step}{of}, {'verified' if self.verified else 'sizes match'}{once}")
        parts += [self.converted] if self.converted and not self.refused else []
        parts += self.refused
        parts += self.passed_over
        parts += [f"{name} {show(old)} -> {show(new)}" for name, old, new in self.changed]
        parts += [f"input '{role}' changed" for role in self.changed_inputs]
        if self.version:
            parts.append(f"stage version {self.version[0]} -> {self.version[1]}")
        if self.damage:
            parts.append(f"its artifact is damaged: {'; '.join(self.damage[:3])}")
        told = "; ".join(parts) or "not made yet"
        for role, files in self.edited:
            told += f"; input '{role}' differs from its manifest: {', '.join(files[:3])}: taken as an input of its own"
        return told


def show(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


def difference(old: Mapping[str, Any], identity: Mapping[str, Any]) -> Reason:
    """What changed since the recipe last ran the step, as whose identity `old` was recorded."""
    if old.keys() != identity.keys() or old["kind"] != identity["kind"]:
        return Reason()
    old_params, new_params = dict(flatten(old["params"])), dict(flatten(identity["params"]))
    names = dict.fromkeys([*old_params, *new_params])
    changed = [
        (name, old_params.get(name, ABSENT), new_params.get(name, ABSENT))
        for name in names
        if old_params.get(name, ABSENT) != new_params.get(name, ABSENT)
    ]
    if old["seed"] != identity["seed"]:
        changed.append(("seed", old["seed"], identity["seed"]))
    roles = dict.fromkeys([*old["inputs"], *identity["inputs"]])
    version = (old["version"], identity["version"])
    return Reason(
        changed=tuple(changed),
        changed_inputs=tuple(r for r in roles if old["inputs"].get(r) != identity["inputs"].get(r)),
        version=version if version[0] != version[1] else None,
    )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value) of every leaf of nested mappings and of lists of mappings; their numbers count from 0."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
