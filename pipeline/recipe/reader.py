"""A recipe read from YAML and checked as a whole: every problem of it is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from pipeline.errors import Problem, RecipeError, SlipwayError, did_you_mean
from pipeline.recipe.graph import in_order, needed_for
from pipeline.recipe.outside import kind_of_folder
from pipeline.recipe.recipe import HUB, Hub, Outside, Recipe, RecipeStep, Source, Upstream, upstream_of
from pipeline.settings.resources import LAYOUTS, Resources, find_layout
from pipeline.settings.strict import CHECKOUT, Reading, Strict, validate
from pipeline.settings.yaml_loader import load_yaml, parse_yaml
from pipeline.stage import Input, Stage
from pipeline.store.artifact import MANIFEST, Kind, read_manifest


class StageSpec(Strict):
    """One entry below `stages:`."""

    kind: str
    """What the stage does: a name that `slipway stages` lists."""
    inputs: dict[str, Any] = {}
    """Role -> the name of another stage, a path (with a `/`), or `hub:owner/name@<40 hex revision>`."""
    params: dict[str, Any] = {}
    """What decides the result: `slipway stages KIND` lists the fields."""
    resources: dict[str, Any] = {}
    """Where it runs: overrides the recipe's `resources`, field by field."""
    seed: int | None = Field(default=None, ge=0)
    """Overrides the recipe's seed."""


class RecipeFile(Strict):
    """The top level of a recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Lower-case letters, digits, `-` and `_`."""
    description: str = ""
    """A sentence for readers."""
    seed: int = Field(default=42, ge=0)
    """Seed of every stage that does not name its own."""
    outputs: list[str] = Field(min_length=1)
    """The stages whose artifacts the recipe is for. A stage that none of them needs is an error."""
    resources: dict[str, Any] = {}
    """Resources of every stage that can run in several processes; the others run in one."""
    stages: dict[str, Any] = Field(min_length=1)
    """Name -> stage."""


class HasOptions(Protocol):
    """What a recipe's reader needs of a launcher; `launch/` has them."""

    @property
    def options(self) -> type[Strict]:
        """The fields that a recipe may write beside `kind` in `launcher: {kind: ...}`."""


def load_recipe(
    path: Path, stages: Mapping[str, Stage], launchers: Mapping[str, HasOptions], overrides: Iterable[str] = ()
) -> Recipe:
    """The recipe in `path`, checked. Raises one `RecipeError` with everything that is wrong with it."""
    found = Reading([Path.cwd()]).find(str(path))
    if found is None:
        known = sorted(str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "pipeline" / "recipes").glob("*.yaml"))
        raise RecipeError(Problem(str(path), "no such recipe", f"Recipes that come along: {', '.join(known)}."))
    overrides = tuple(overrides)
    document, problems = load_yaml(found)
    if not isinstance(document, dict):
        raise RecipeError(Problem(str(path), "is not a recipe: a mapping of fields is expected at its top"))
    problems += apply_overrides(document, overrides)
    reader = Reader(where=f"{path}: ", folders=[found.parent], stages=stages, launchers=launchers, problems=problems)
    return reader.read(document, found, overrides)


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> list[Problem]:
    """Applies `--set a.b=c` to the document. A path that starts with a stage's name means below that stage:
    `align.beta=0.2` is `stages.align.params.beta=0.2`."""
    problems = []
    blocks = document.get("stages")
    stages = blocks if isinstance(blocks, dict) else {}
    for override in overrides:
        target, separator, text = override.partition("=")
        keys = target.strip().split(".")
        if not separator or not all(keys):
            problems.append(
                Problem(f"--set {override}", "is not of the form path=value", "Write --set align.beta=0.2.")
            )
            continue
        if keys[0] not in RecipeFile.model_fields:
            if keys[0] not in stages:
                hint = did_you_mean(keys[0], [*stages, *RecipeFile.model_fields])
                problems.append(Problem(f"--set {override}", f"the recipe has no stage '{keys[0]}'", hint))
                continue
            below = keys[1:] if keys[1:2] and keys[1] in StageSpec.model_fields else ["params", *keys[1:]]
            keys = ["stages", keys[0], *below]
        try:
            value, duplicates = parse_yaml(text, f"--set {override}")
        except RecipeError as error:
            problems += [problem for problem in error.problems if isinstance(problem, Problem)]
            continue
        problems += duplicates
        place: Any = document
        for key in keys[:-1]:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                problems.append(Problem(f"--set {override}", f"'{key}' is not a mapping", "Check the path."))
                break
        else:
            place[keys[-1]] = value
    return problems


@dataclass
class Reader:
    """Reads one recipe; what is wrong gathers in `problems`."""

    where: str
    folders: list[Path]
    stages: Mapping[str, Stage]
    launchers: Mapping[str, HasOptions]
    problems: list[Problem] = field(default_factory=list)

    def context(self) -> Reading:
        return Reading(list(self.folders))

    def problem(self, where: str, what: str, hint: str = "") -> None:
        self.problems.append(Problem(self.where + where, what, hint))

    def check(self, model: type[Any], value: Any, where: str) -> Any:
        checked, problems = validate(model, value, self.where + where, self.context())
        self.problems += problems
        return checked

    def read(self, document: dict[str, Any], path: Path, overrides: tuple[str, ...]) -> Recipe:
        top, problems = validate(RecipeFile, document, "", self.context())
        self.problems += [Problem(self.where + p.where, p.what, p.hint) for p in problems]
        blocks = document.get("stages")
        blocks = blocks if isinstance(blocks, dict) else {}
        specs = {
            name: spec for name, block in blocks.items() if (spec := self.check(StageSpec, block, f"stages.{name}"))
        }
        resources, named = document.get("resources"), document.get("outputs")
        common = resources if isinstance(resources, dict) else {}
        if common:
            self.problems += self.check_resources(common, "resources")[1]
        seed = top.seed if top else 42
        sources = {name: self.read_inputs(name, spec, set(blocks)) for name, spec in specs.items()}
        outputs = named if isinstance(named, list) else []
        upstream = {name: upstream_of(of_stage) for name, of_stage in sources.items()}
        order = self.order(list(blocks), upstream)
        self.check_outputs(outputs, list(blocks), upstream)
        steps = self.resolve(order, specs, sources, common, seed)
        if self.problems:
            raise RecipeError(*unique(self.problems))
        assert top is not None
        return Recipe(path=path, name=top.name, overrides=overrides, outputs=tuple(top.outputs), steps=tuple(steps))

    def read_inputs(self, name: str, spec: StageSpec, known: set[str]) -> dict[str, Source]:
        """Role -> source, roles that take several flattened to `role.name`."""
        stage = self.stages.get(spec.kind)
        sources: dict[str, Source] = {}
        for role, value in spec.inputs.items():
            where = f"stages.{name}.inputs.{role}"
            declared = stage.inputs.get(role) if stage else None
            if stage and declared is None:
                self.problem(
                    where, f"the stage '{spec.kind}' has no input of this name", did_you_mean(role, stage.inputs)
                )
                continue
            if isinstance(value, Mapping) and (declared is None or declared.many):
                for key, item in value.items():
                    if source := self.read_source(item, f"{where}.{key}", known):
                        sources[f"{role}.{key}"] = source
            elif declared and declared.many:
                self.problem(where, "takes several: name each", f"Write `{role}: {{some_name: {value}}}`.")
            elif source := self.read_source(value, where, known):
                sources[role] = source
        return sources

    def read_source(self, value: Any, where: str, known: set[str]) -> Source | None:
        if not isinstance(value, str):
            self.problem(where, f"must be a stage's name, a path or {HUB}owner/name@revision, not {value!r}")
        elif value in known:
            return Upstream(value)
        elif value.startswith(HUB):
            repository, _, revision = value.removeprefix(HUB).partition("@")
            if re.fullmatch(r"[0-9a-f]{40}", revision):
                return Hub(repository, revision)
            hint = f"Write {HUB}{repository}@<40 hex digits>: the commit shown on the repository's page."
            self.problem(where, f"'{value}' names no exact revision", hint)
        elif "/" in value or value.startswith((".", "~")):
            path = self.context().find(value)
            if path is None:
                self.problem(where, f"no such folder: {value}", "Correct the path.")
                return None
            return self.read_outside(path, where)
        else:
            hint = did_you_mean(value, sorted(known)) + " A path needs a '/'."
            self.problem(where, f"there is no stage '{value}'", hint)
        return None

    def read_outside(self, path: Path, where: str) -> Outside | None:
        try:
            if (path / MANIFEST).exists():
                manifest = read_manifest(path)
                return Outside(path, manifest.artifact_kind, manifest.artifact_id)
            return Outside(path, kind_of_folder(path))
        except SlipwayError as error:
            self.problem(where, str(error))
            return None

    def order(self, names: list[str], upstream: Mapping[str, list[str]]) -> list[str]:
        """The stages, each after its inputs, otherwise as written. A cycle is a problem."""
        order, cycle = in_order(names, upstream)
        if cycle:
            self.problem(
                f"stages.{cycle[0]}.inputs",
                f"the stages wait for each other: {' <- '.join(cycle)}",
                "Remove one of these inputs.",
            )
        return order

    def check_outputs(self, outputs: list[Any], names: list[str], upstream: Mapping[str, list[str]]) -> None:
        for index, output in enumerate(outputs):
            if output not in names:
                self.problem(f"outputs.{index}", f"there is no stage '{output}'", did_you_mean(str(output), names))
        used = needed_for([output for output in outputs if output in names], upstream)
        for name in names:
            if name not in used and outputs:
                self.problem(f"stages.{name}", "no output needs this stage", "Add it to `outputs`, or remove it.")

    def resolve(
        self,
        order: list[str],
        specs: Mapping[str, StageSpec],
        sources: Mapping[str, Mapping[str, Source]],
        common: Mapping[str, Any],
        seed: int,
    ) -> list[RecipeStep]:
        # What does not depend on params is known at once, also of stages that wait for each other.
        kinds: dict[str, Kind] = {
            name: stage.output
            for name, spec in specs.items()
            if (stage := self.stages.get(spec.kind)) and isinstance(stage.output, Kind)
        }
        steps = []
        for name in order:
            spec = specs.get(name)
            if spec is None:
                continue
            stage = self.stages.get(spec.kind)
            if stage is None:
                self.problem(
                    f"stages.{name}.kind", f"there is no stage '{spec.kind}'", did_you_mean(spec.kind, self.stages)
                )
                continue
            params = self.check(stage.params, spec.params, f"stages.{name}.params")
            resources = self.read_resources(name, stage, spec, common)
            input_kinds = self.check_kinds(name, stage, sources[name], kinds, spec)
            if params is None:
                continue
            try:
                kinds[name] = stage.output_kind(params, input_kinds)
            except SlipwayError as error:
                self.problem(f"stages.{name}", str(error))
                continue
            except KeyError:
                continue
            if resources is not None:
                own_seed = seed if spec.seed is None else spec.seed
                steps.append(RecipeStep(name, stage, params, sources[name], kinds[name], resources, own_seed))
        return steps

    def read_resources(self, name: str, stage: Stage, spec: StageSpec, common: Mapping[str, Any]) -> Resources | None:
        where = f"stages.{name}.resources"
        merged = {**common, **spec.resources} if stage.distributed else dict(spec.resources)
        own, problems = self.check_resources(merged, where)
        self.problems += [
            p for p in problems if p.where.removeprefix(f"{self.where}{where}.").split(".")[0] in spec.resources
        ]
        if own is None:
            return None
        if not stage.distributed and own.world_size > 1:
            self.problem(where, f"the stage '{stage.kind}' runs in one process", "Remove `processes` and `nodes`.")
        inherited = stage.distributed and "launcher" in common and "launcher" not in spec.resources
        launcher = self.read_launcher(own, "resources.launcher" if inherited else f"{where}.launcher")
        if own.launcher_name == "local" and own.world_size > 1:
            self.problem(f"{where}.launcher", "'local' starts one process", "Use torchrun or deepspeed.")
        layout = find_layout(own.deepspeed, self.context()) if own.deepspeed else None
        if own.deepspeed and layout is None:
            known = sorted(path.stem for path in LAYOUTS.glob("*.json"))
            self.problem(
                f"{where}.deepspeed", f"there is no memory layout '{own.deepspeed}'", did_you_mean(own.deepspeed, known)
            )
        update = {"launcher": launcher, **({"deepspeed": str(layout)} if layout else {})}
        return own.model_copy(update=update)

    def check_resources(self, value: Mapping[str, Any], where: str) -> tuple[Resources | None, list[Problem]]:
        """The resources, or None, and what is wrong; an option of a launcher that stands beside it is shown its place."""
        own, problems = validate(Resources, value, self.where + where, self.context())
        options = {name: kind for kind, each in self.launchers.items() for name in each.options.model_fields}
        for index, problem in enumerate(problems):
            field_name = problem.where.removeprefix(f"{self.where}{where}.")
            if kind := options.get(field_name):
                hint = f"Write `launcher: {{kind: {kind}, {field_name}: {value[field_name]}}}`."
                problems[index] = Problem(problem.where, f"is an option of the launcher '{kind}'", hint)
        return own, problems

    def read_launcher(self, resources: Resources, where: str) -> str | dict[str, Any]:
        """The launcher as it goes into the job: its name, or `kind` and the options given, their paths absolute."""
        name = resources.launcher_name
        if not name:
            hint = f"Write `kind: {' or '.join(self.launchers)}`."
            self.problem(f"{where}.kind", "is required: the launcher's name", hint)
        elif name not in self.launchers:
            self.problem(where, f"there is no launcher '{name}'", did_you_mean(name, self.launchers))
        elif given := resources.launcher_options:
            options = self.check(self.launchers[name].options, given, where)
            return {"kind": name, **options.model_dump(mode="json", exclude_unset=True)} if options else name
        return name

    def check_kinds(
        self, name: str, stage: Stage, sources: Mapping[str, Source], kinds: Mapping[str, Kind], spec: StageSpec
    ) -> dict[str, Kind]:
        found = {}
        for role, source in sources.items():
            declared = stage.inputs[role.partition(".")[0]]
            kind = kinds.get(source.step) if isinstance(source, Upstream) else None
            kind = source.kind if isinstance(source, Outside) else kind
            if kind is None:
                continue
            found[role] = kind
            if kind not in declared.kinds:
                wanted = " or ".join(sorted(declared.kinds))
                given = f"'{source.step}' makes" if isinstance(source, Upstream) else "the folder holds"
                self.problem(
                    f"stages.{name}.inputs.{role}", f"needs {wanted}, and {given} {kind}", kind_hint(declared, kinds)
                )
        for role, declared in stage.inputs.items():
            if not declared.optional and role not in spec.inputs:
                wanted = " or ".join(sorted(declared.kinds))
                self.problem(f"stages.{name}.inputs.{role}", f"is required: {wanted}", kind_hint(declared, kinds))
        return found


def kind_hint(declared: Input, kinds: Mapping[str, Kind]) -> str:
    """Which stages of the recipe would fit."""
    fitting = [name for name, kind in kinds.items() if kind in declared.kinds]
    return f"These stages would fit: {', '.join(fitting)}." if fitting else "Add a stage that makes one."


def unique(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
