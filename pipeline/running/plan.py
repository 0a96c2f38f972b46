"""What will run, and why: computes ids in order, asks the store, changes nothing there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import PathError, Problem, RecipeError
from pipeline.recipe.recipe import Hub, Outside, Recipe, RecipeStep, Upstream
from pipeline.settings.paths import read_json
from pipeline.settings.strict import content_of
from pipeline.stage import Estimate, Forecast
from pipeline.store.artifact import Manifest, canonical_json, digest_bytes
from pipeline.store.checkpoints import Newest
from pipeline.store.digests import Digests, cache_file
from pipeline.store.job import Job
from pipeline.store.store import Store

HASHED_AT_PLAN_BYTES = 64_000_000
"""Checkpoints up to this size are hashed when a plan is made; of larger ones only the sizes are compared until they are used."""


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
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that did not verify."""
    waits_for: tuple[str, ...] = ()
    """Steps whose artifacts are missing, for a step that is blocked."""
    running: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.running:
            parts.append(self.running)
        if self.made:
            parts.append(f"made {self.made}")
        if self.waits_for:
            parts.append(f"needs {', '.join(self.waits_for)}, which this command does not run")
        if self.checkpoint:
            step, total = self.checkpoint
            of = f" of {total}" if total else ""
            parts.append(f"checkpoint {step}{of}, {'verified' if self.verified else 'sizes match'}")
        parts += self.passed_over
        parts += [f"{name} {show(old)} -> {show(new)}" for name, old, new in self.changed]
        parts += [f"input '{role}' changed" for role in self.changed_inputs]
        if self.version:
            parts.append(f"stage version {self.version[0]} -> {self.version[1]}")
        if self.damage:
            parts.append(f"its artifact is damaged: {'; '.join(self.damage[:3])}")
        return "; ".join(parts) or "not made yet"


def show(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


@dataclass(frozen=True)
class Step:
    """One step of a plan."""

    recipe_step: RecipeStep
    artifact_id: str
    identity: Mapping[str, Any]
    action: Action
    reason: Reason
    inputs: Mapping[str, str]
    input_ids: Mapping[str, str]
    estimate: Estimate
    work: Path
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        return self.recipe_step.name

    def job(self, recipe: str, store: Store) -> Job:
        step = self.recipe_step
        params = step.params.model_dump(mode="json")
        return Job(
            recipe=recipe,
            step=step.name,
            kind=step.stage.kind,
            stage_version=step.stage.version,
            artifact_id=self.artifact_id,
            artifact_kind=step.output_kind.value,
            params=params,
            inputs=dict(self.inputs),
            input_ids=dict(self.input_ids),
            source_digests=source_digests(params, self.identity["params"]),
            seed=step.seed,
            resources=step.resources,
            store=str(store.folder),
            work=str(self.work),
        )


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe in order, with what each will do."""

    recipe: Recipe
    steps: tuple[Step, ...]
    left_out: tuple[str, ...] = field(default=())
    """Steps that this command does not run because of --only or --until."""

    def step(self, name: str) -> Step:
        self.recipe.step(name)
        return next(step for step in self.steps if step.name == name)

    @property
    def chosen(self) -> list[Step]:
        return [step for step in self.steps if step.name not in self.left_out]

    def record(self) -> dict[str, Any]:
        """What the store remembers of a plan that ran."""
        return {
            "path": str(self.recipe.path),
            "overrides": list(self.recipe.overrides),
            "steps": {
                step.name: {
                    "artifact_id": step.artifact_id,
                    "identity": step.identity,
                    "kind": step.recipe_step.stage.kind,
                }
                for step in self.steps
            },
        }


def make_plan(recipe: Recipe, store: Store, *, only: str | None = None, until: str | None = None) -> Plan:
    """What running the recipe now would do. Raises `RecipeError` with everything that would fail for certain."""
    chosen = {step.name for step in recipe.steps}
    if only:
        chosen = {recipe.step(only).name}
    elif until:
        chosen = recipe.needed_for(until)
    before = store.records().get(recipe.name, {}).get("steps", {})
    planned: dict[str, Step] = {}
    problems: list[Problem] = []
    digests = Digests(cache_file())
    # A recipe names the same source in several steps: within a plan each is looked at once.
    digest = functools.cache(digests.of)
    for recipe_step in recipe.steps:
        planner = StepPlanner(recipe_step, store, digest, planned, before.get(recipe_step.name))
        step = planner.plan(recipe_step.name in chosen, chosen)
        planned[step.name] = step
        problems += [
            replace(problem, where=f"{recipe.path.name}: stages.{step.name}.{problem.where}")
            for problem in planner.problems
        ]
    digests.save()
    if problems:
        raise RecipeError(*problems)
    left_out = tuple(name for name in planned if name not in chosen)
    return Plan(recipe=recipe, steps=tuple(planned.values()), left_out=left_out)


@dataclass
class StepPlanner:
    """Plans one step, given the steps before it."""

    step: RecipeStep
    store: Store
    digest: Callable[[Path], str]
    planned: Mapping[str, Step]
    before: Mapping[str, Any] | None
    problems: list[Problem] = field(default_factory=list)

    def plan(self, is_chosen: bool, chosen: set[str]) -> Step:
        input_ids = {role: self.input_id(source) for role, source in self.step.inputs.items()}
        identity = {
            "kind": self.step.stage.kind,
            "version": self.step.stage.version,
            "params": content_of(self.step.params, self.digest),
            "seed": self.step.seed,
            "inputs": input_ids,
        }
        artifact_id = digest_bytes(canonical_json(identity))
        work = self.store.work_folder(self.step.name, artifact_id)
        manifest = self.store.find(artifact_id)
        forecast = Forecast(self.step.params, self.step.resources, self.input_estimates())
        if manifest is None:
            self.problems += self.step.stage.check(forecast)
        own = Estimate() if self.problems else self.step.stage.estimate(forecast)
        estimate = merge(own, estimate_of(manifest, self.store.artifact_folder(artifact_id))) if manifest else own
        action, reason = self.decide(artifact_id, identity, work, manifest, estimate, chosen if is_chosen else set())
        return Step(
            recipe_step=self.step,
            artifact_id=artifact_id,
            identity=identity,
            action=action,
            reason=reason,
            inputs={role: self.input_place(source) for role, source in self.step.inputs.items()},
            input_ids=input_ids,
            estimate=estimate,
            work=work,
            manifest=manifest,
        )

    def input_id(self, source: Upstream | Outside | Hub) -> str:
        if isinstance(source, Upstream):
            return self.planned[source.step].artifact_id
        if isinstance(source, Outside):
            return source.artifact_id or self.digest(source.path)
        return str(source)

    def input_place(self, source: Upstream | Outside | Hub) -> str:
        if isinstance(source, Upstream):
            return str(self.store.artifact_folder(self.planned[source.step].artifact_id))
        return str(source.path) if isinstance(source, Outside) else str(source)

    def input_estimates(self) -> dict[str, Estimate]:
        estimates = {}
        for role, source in self.step.inputs.items():
            if isinstance(source, Upstream):
                estimates[role] = self.planned[source.step].estimate
            elif isinstance(source, Outside):
                estimates[role] = Estimate(architecture=architecture_of(source.path))
            else:
                estimates[role] = Estimate()
        return estimates

    def decide(
        self,
        artifact_id: str,
        identity: Mapping[str, Any],
        work: Path,
        manifest: Manifest | None,
        estimate: Estimate,
        chosen: set[str],
    ) -> tuple[Action, Reason]:
        if manifest:
            return Action.SKIP, Reason(made=f"{manifest.created_at[:16].replace('T', ' ')} UTC")
        reason = self.difference(identity)
        reason = replace(reason, damage=tuple(self.store.damage(artifact_id)))
        missing = [
            name for name in self.step.upstream if self.planned[name].action is not Action.SKIP and name not in chosen
        ]
        missing += [
            name for name in self.step.upstream if self.planned[name].action is Action.BLOCKED and name in chosen
        ]
        if missing:
            return Action.BLOCKED, replace(reason, waits_for=tuple(dict.fromkeys(missing)))
        if running := self.store.running(work):
            return Action.BLOCKED, Reason(
                running=f"process {running.pid} on {running.host} runs it; log: {running.log}"
            )
        newest, verified = self.newest_checkpoint(artifact_id)
        passed_over = tuple(newest.passed_over)
        if newest.path:
            checkpoint = (newest.step, estimate.optimizer_steps)
            return Action.RESUME, Reason(checkpoint=checkpoint, verified=verified, passed_over=passed_over)
        return Action.RUN, replace(reason, passed_over=passed_over)

    def newest_checkpoint(self, artifact_id: str) -> tuple[Newest, bool]:
        checkpoints = self.store.checkpoints(self.step.name, artifact_id)
        newest = checkpoints.newest(hashes=False)
        if newest.path is None:
            return newest, True
        size = sum(path.stat().st_size for path in newest.path.rglob("*") if path.is_file())
        if size > HASHED_AT_PLAN_BYTES:
            return newest, False
        return checkpoints.newest(), True

    def difference(self, identity: Mapping[str, Any]) -> Reason:
        """What changed since the recipe last ran this step."""
        old = (self.before or {}).get("identity")
        if not old or old["kind"] != identity["kind"]:
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


def source_digests(params: Mapping[str, Any], identity_params: Mapping[str, Any]) -> dict[str, str]:
    """Param -> `path digest` for the params that name outside files: there the identity holds a digest instead."""
    digests = dict(leaves(identity_params))
    return {
        name: f"{digests[name]} {path}"
        for name, path in leaves(params)
        if digests[name] != path and str(digests[name]).startswith("sha256:")
    }


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value) of every leaf of nested mappings and lists."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix, value
        return
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


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
