"""What will run, and why: computes ids in order, asks the store, changes nothing there but what it knows of hashed files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, RecipeError
from pipeline.recipe.recipe import Hub, Outside, Recipe, RecipeStep, Upstream
from pipeline.running.estimates import architecture_of, estimate_of, merge
from pipeline.running.extending import converted_extension, extended_checkpoint, extension_of, refused_extension
from pipeline.running.reasons import Action, Reason, difference
from pipeline.running.unfinished import Unfinished, find_unfinished
from pipeline.settings.strict import content_of
from pipeline.stage import EXTENDS, Estimate, Forecast
from pipeline.store.artifact import Manifest, canonical_json, digest_bytes, intruders, read_manifest
from pipeline.store.digests import Digests, cache_file
from pipeline.store.job import Job
from pipeline.store.proofs import edits, prove
from pipeline.store.records import RecordedStep, newest_plan
from pipeline.store.resumable import converted, obstacle, read_saved, spread_of
from pipeline.store.store import Store
from pipeline.store.works import read_work, work_folders

__all__ = ["Action", "Plan", "Reason", "Step", "make_plan"]


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
    adopts: Path | None = None
    """The work folder to go on from, where the step had another name: it is moved to `work` when the step starts."""
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        return self.recipe_step.name

    @property
    def will_run(self) -> bool:
        return self.action in (Action.RUN, Action.RESUME)

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

    def ids(self, store: Store) -> set[str]:
        """The ids of all artifacts that the plan makes or reads, whether made or not."""
        found: set[str] = set()
        for step in self.steps:
            found |= {step.artifact_id, *step.input_ids.values(), *store.artifacts_at(step.inputs.values())}
        return found

    def record(self, store: Store) -> dict[str, Any]:
        """What the store remembers of a plan that ran."""
        return {
            "path": str(self.recipe.path),
            "overrides": list(self.recipe.overrides),
            "steps": {
                step.name: {
                    "artifact_id": step.artifact_id,
                    "identity": step.identity,
                    "kind": step.recipe_step.stage.kind,
                    "folders": sorted(store.artifacts_at(step.inputs.values())),
                }
                for step in self.steps
            },
        }


def make_plan(
    recipe: Recipe, store: Store, *, only: str | None = None, until: str | None = None, verify: bool = False
) -> Plan:
    """What running the recipe now would do. Raises `RecipeError` with everything that would fail for certain.

    To `verify` is to hash every artifact and outside file again.
    """
    chosen = {step.name for step in recipe.steps}
    if only is not None:
        chosen = {recipe.step(only).name}
    elif until is not None:
        chosen = recipe.needed_for(until)
    recorded = newest_plan(store.recipes, recipe.name, str(recipe.path))
    before = recorded.steps if recorded else {}
    planned: dict[str, Step] = {}
    problems: list[Problem] = []
    digests = Digests(cache_file(), again=verify)
    known = Known(store, digests, verify)
    for recipe_step in recipe.steps:
        planner = StepPlanner(recipe_step, store, known, planned, before.get(recipe_step.name))
        step = planner.plan(recipe_step.name in chosen, chosen)
        planned[step.name] = step
        # What this command leaves out may be wrong: it is not run, and may be mended later.
        problems += [
            replace(problem, where=f"{recipe.path.name}: stages.{step.name}.{problem.where}")
            for problem in (planner.problems if step.name in chosen else ())
        ]
    digests.save()
    if problems:
        raise RecipeError(*problems)
    left_out = tuple(name for name in planned if name not in chosen)
    return Plan(recipe=recipe, steps=tuple(planned.values()), left_out=left_out)


class Known:
    """What is asked of files while a plan is made: each is looked at once, however many steps name it."""

    def __init__(self, store: Store, digests: Digests, verify: bool) -> None:
        self.verify = verify
        self.digest = functools.cache(digests.of)
        self.edits = functools.cache(self.find_edits)
        self.works = work_folders(store.work)

    def find_edits(self, folder: Path) -> tuple[str, ...]:
        """The files for which a folder that carries an artifact's manifest is not that artifact."""
        return tuple(edits(folder, read_manifest(folder), again=self.verify))


@dataclass
class StepPlanner:
    """Plans one step, given the steps before it."""

    step: RecipeStep
    store: Store
    known: Known
    planned: Mapping[str, Step]
    before: RecordedStep | None
    problems: list[Problem] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    """What was found when the step's artifact was hashed again."""

    def plan(self, is_chosen: bool, chosen: set[str]) -> Step:
        input_ids = {role: self.input_id(source) for role, source in self.step.inputs.items()}
        identity = {
            "kind": self.step.stage.kind,
            "version": self.step.stage.version,
            "params": content_of(self.step.params, self.known.digest),
            "seed": self.step.seed,
            "inputs": input_ids,
        }
        artifact_id = digest_bytes(canonical_json(identity))
        manifest = self.find(artifact_id)
        extended, problems = extension_of(self.step, identity, self.planned, self.place_of(EXTENDS))
        forecast = Forecast(self.step.params, self.step.resources, self.input_estimates(), extended)
        if manifest is None:
            self.problems += problems + self.step.stage.check(forecast)
        own = Estimate() if self.problems else self.step.stage.estimate(forecast)
        estimate = merge(own, estimate_of(manifest, self.store.artifact_folder(artifact_id))) if manifest else own
        work = self.store.work_folder(self.step.name, artifact_id)
        unfinished = None if manifest else find_unfinished(work, artifact_id, self.known.works, self.store)
        action, reason = self.decide(
            artifact_id, identity, unfinished, manifest, estimate, chosen if is_chosen else set()
        )
        return Step(
            recipe_step=self.step,
            artifact_id=artifact_id,
            identity=identity,
            action=action,
            reason=replace(reason, edited=self.edited()),
            inputs={role: self.input_place(source) for role, source in self.step.inputs.items()},
            input_ids=input_ids,
            estimate=estimate,
            work=work,
            adopts=unfinished.folder if unfinished and unfinished.newest and unfinished.folder != work else None,
            manifest=manifest,
        )

    def find(self, artifact_id: str) -> Manifest | None:
        """The manifest of the artifact, if it is made and, to verify, all its files hash to what they should."""
        manifest = self.store.find(artifact_id)
        if manifest and self.known.verify:
            found = prove(self.store.artifact_folder(artifact_id), manifest, again=True)
            self.damage = [f"{name} {what}" for name, what in found.items()]
        return None if self.damage else manifest

    def input_id(self, source: Upstream | Outside | Hub) -> str:
        if isinstance(source, Upstream):
            return self.planned[source.step].artifact_id
        if isinstance(source, Outside):
            if source.artifact_id and source.lies_in_store:
                return source.path.name
            is_artifact = source.artifact_id and not self.known.edits(source.path)
            return str(source.artifact_id) if is_artifact else self.known.digest(source.path)
        return str(source)

    def edited(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(role, files) of the inputs that carry an artifact's manifest and are not that artifact."""
        outside = {role: each for role, each in self.step.inputs.items() if isinstance(each, Outside)}
        copies = {role: each for role, each in outside.items() if each.artifact_id and not each.lies_in_store}
        found = {role: self.known.edits(each.path) for role, each in copies.items()}
        return tuple((role, files) for role, files in found.items() if files)

    def input_place(self, source: Upstream | Outside | Hub) -> str:
        if isinstance(source, Upstream):
            return str(self.store.artifact_folder(self.planned[source.step].artifact_id))
        return str(source.path) if isinstance(source, Outside) else str(source)

    def place_of(self, role: str) -> str:
        return self.input_place(self.step.inputs[role]) if role in self.step.inputs else ""

    def input_estimates(self) -> dict[str, Estimate]:
        estimates = {}
        for role, source in self.step.inputs.items():
            if isinstance(source, Upstream):
                estimates[role] = self.planned[source.step].estimate
            elif isinstance(source, Outside):
                estimates[role] = Estimate(architecture=architecture_of(source.path), folder=source.path)
            else:
                estimates[role] = Estimate()
        return estimates

    def decide(
        self,
        artifact_id: str,
        identity: Mapping[str, Any],
        unfinished: Unfinished | None,
        manifest: Manifest | None,
        estimate: Estimate,
        chosen: set[str],
    ) -> tuple[Action, Reason]:
        if manifest:
            return Action.SKIP, Reason(made=f"{manifest.created_at[:16].replace('T', ' ')} UTC")
        makers = [name for name, step in self.planned.items() if step.artifact_id == artifact_id and step.will_run]
        if maker := next((name for name in makers if name in chosen), None):
            return Action.SKIP, Reason(same_as=maker)
        reason = difference(self.before.identity if self.before else {}, identity)
        reason = replace(reason, damage=tuple(self.damage or self.store.damage(artifact_id)))
        missing = [
            name for name in self.step.upstream if self.planned[name].action is not Action.SKIP and name not in chosen
        ]
        missing += [
            name for name in self.step.upstream if self.planned[name].action is Action.BLOCKED and name in chosen
        ]
        if missing:
            return Action.BLOCKED, replace(reason, waits_for=tuple(dict.fromkeys(missing)))
        if unfinished and unfinished.running:
            here = unfinished.folder == self.store.work_folder(self.step.name, artifact_id)
            return Action.BLOCKED, Reason(running=unfinished.running, running_here=here)
        if refused := self.refused_inputs():
            return Action.BLOCKED, replace(reason, refused=refused)
        if unfinished and unfinished.newest:
            return self.resume(unfinished, unfinished.newest, estimate)
        extended = extended_checkpoint(self.step, self.planned, self.place_of(EXTENDS))
        if why := refused_extension(self.step, extended, self.place_of(EXTENDS)):
            return Action.BLOCKED, replace(reason, refused=(why,))
        passed_over = unfinished.passed_over if unfinished else ()
        changes = converted_extension(self.step, extended)
        return Action.RUN, replace(reason, passed_over=passed_over, converted=changes)

    def resume(self, unfinished: Unfinished, checkpoint: Path, estimate: Estimate) -> tuple[Action, Reason]:
        """Resumes from the checkpoint, or says why its memory layout forbids that."""
        saved, now = read_saved(checkpoint), spread_of(self.step.resources)
        total = saved.total_steps or estimate.optimizer_steps
        once = read_work(unfinished.folder).step
        reason = Reason(
            checkpoint=(unfinished.step, total),
            verified=unfinished.verified,
            once=once if once != self.step.name else None,
            passed_over=unfinished.passed_over,
            converted=converted(saved, now) if now is not None else "",
        )
        if refused := obstacle(checkpoint, self.step.resources, self.step.name):
            return Action.BLOCKED, replace(reason, refused=(refused,))
        return Action.RESUME, reason

    def refused_inputs(self) -> tuple[str, ...]:
        """Inputs that are damaged, or hold files which would be read and are no part of them."""
        refused = []
        for role, source in self.step.inputs.items():
            in_store = isinstance(source, Outside) and source.artifact_id and source.lies_in_store
            if isinstance(source, Outside) and in_store and (damaged := self.known.edits(source.path)):
                refused.append(
                    f"input '{role}' lies in a store and differs from its manifest: {', '.join(damaged[:3])};"
                    " run the recipe that made it again, or name a copy that lies elsewhere"
                )
        for role, source in self.step.inputs.items():
            made = self.planned[source.step].manifest if isinstance(source, Upstream) else None
            folder = Path(self.input_place(source))
            if made and (names := intruders(folder, made.files)):
                refused.append(
                    f"input '{role}' holds {', '.join(names[:3])}, which its manifest does not list: move it out of {folder}"
                )
        return tuple(refused)


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
