"""A recipe read from YAML and checked as a whole: every problem of it is reported at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import (
    Problem,
    RecipeError,
    SlipwayError,
    did_you_mean,
    shown,
    shown_path,
)
from pipeline.figures import escaped
from pipeline.recipe.checking import Checking, unique
from pipeline.recipe.graph import in_order, needed_for
from pipeline.recipe.outside import how_to_give, kind_of_folder, tokenizer_problem, weights_problem
from pipeline.recipe.overrides import apply_overrides
from pipeline.recipe.recipe import (
    HUB,
    NAME,
    NAME_RULE,
    REPOSITORY,
    Hub,
    Outside,
    Recipe,
    RecipeStep,
    Source,
    Upstream,
    upstream_of,
)
from pipeline.recipe.resources_reader import HasOptions, IsTracker, ResourcesReader
from pipeline.recipe.schema import MOST_STAGES, RecipeFile, StageSpec
from pipeline.settings.paths import is_file
from pipeline.settings.strict import CHECKOUT, Reading, validate
from pipeline.settings.yaml_loader import load_yaml
from pipeline.stage import Input, Stage
from pipeline.store.artifact import MANIFEST, Kind, read_manifest


def load_recipe(
    path: Path,
    stages: Mapping[str, Stage],
    launchers: Mapping[str, HasOptions],
    overrides: Iterable[str] = (),
    trackers: Mapping[str, IsTracker] | None = None,
) -> Recipe:
    """The recipe in `path`, checked. Raises one `RecipeError` with everything that is wrong with it."""
    found = Reading([Path.cwd()]).find_file(str(path))
    if found is None:
        known = sorted(str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "pipeline" / "recipes").glob("*.yaml"))
        raise RecipeError(Problem(str(path), "no such recipe", f"Recipes that come along: {', '.join(known)}."))
    overrides = tuple(overrides)
    document, problems = load_yaml(found)
    if not isinstance(document, dict):
        raise RecipeError(Problem(str(path), "is not a recipe: a mapping of fields is expected at its top"))
    problems += apply_overrides(document, overrides, list(RecipeFile.model_fields), list(StageSpec.model_fields))
    where, folders = f"{path}: ", [found.parent]
    resources = ResourcesReader(where, folders, problems, launchers, trackers or {})
    return Reader(where, folders, problems, stages, resources).read(document, found, overrides)


@dataclass
class Reader(Checking):
    """Reads one recipe; what is wrong gathers in `problems`."""

    stages: Mapping[str, Stage]
    resources: ResourcesReader

    def read(self, document: dict[str, Any], path: Path, overrides: tuple[str, ...]) -> Recipe:
        top, problems = validate(RecipeFile, document, "", self.context())
        self.problems += [Problem(self.where + p.where, p.what, p.hint) for p in problems]
        blocks = document.get("stages")
        blocks = blocks if isinstance(blocks, dict) else {}
        self.check_names(blocks)
        specs = {
            name: spec for name, block in blocks.items() if (spec := self.check(StageSpec, block, f"stages.{name}"))
        }
        resources, named = document.get("resources"), document.get("outputs")
        common = resources if isinstance(resources, dict) else {}
        if common:
            self.problems += self.resources.check_all(common, "resources")[1]
        if tracking := self.resources.read_tracking(document.get("tracking"), "tracking"):
            common = {"tracking": tracking, **common}
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

    def check_names(self, names: Collection[str]) -> None:
        """Raises `RecipeError` at once for more stages than a recipe may have."""
        if len(names) > MOST_STAGES:
            what = f"has {len(names):,} stages, and {MOST_STAGES:,} are the most"
            raise RecipeError(*self.problems, Problem(f"{self.where}stages", what, "Divide it into several recipes."))
        for name in names:
            if not re.fullmatch(NAME, name):
                self.problem(f"stages.{shown(name, quoted=False)}", "is no name for a stage", f"Allowed: {NAME_RULE}.")

    def read_inputs(self, name: str, spec: StageSpec, known: set[str]) -> dict[str, Source]:
        """Role -> source, roles that take several flattened to `role.name`."""
        stage = self.stages.get(spec.kind)
        sources: dict[str, Source] = {}
        for role, value in spec.inputs.items():
            where = f"stages.{name}.inputs.{role}"
            declared = stage.inputs.get(role) if stage else None
            if stage and declared is None:
                self.problem(
                    where, f"the stage {shown(spec.kind)} has no input of this name", did_you_mean(role, stage.inputs)
                )
                continue
            if isinstance(value, Mapping) and (declared is None or declared.many):
                for key, item in value.items():
                    if not re.fullmatch(NAME, str(key)):
                        place = f"{where}.{shown(key, quoted=False)}"
                        self.problem(place, "is no name for an input", f"Allowed: {NAME_RULE}.")
                    elif source := self.read_source(item, f"{where}.{key}", known):
                        sources[f"{role}.{key}"] = source
            elif declared and declared.many:
                self.problem(where, "takes several: name each", f"Write `{role}: {{some_name: {value}}}`.")
            elif source := self.read_source(value, where, known):
                sources[role] = source
        return sources

    def read_source(self, value: Any, where: str, known: set[str]) -> Source | None:
        if not isinstance(value, str):
            self.problem(where, f"must be a stage's name, a path or {HUB}owner/name@revision, not {shown(value)}")
        elif value in known:
            return Upstream(value)
        elif value.startswith(HUB):
            repository, _, revision = value.removeprefix(HUB).partition("@")
            given = shown(value)
            if not re.fullmatch(REPOSITORY, repository) or ".." in repository or "--" in repository:
                self.problem(where, f"{given} names no repository of the hub", f"Write {HUB}owner/name@revision.")
            elif re.fullmatch(r"[0-9a-f]{40}", revision):
                return Hub(repository, revision)
            else:
                hint = f"Write {HUB}{repository}@<40 hex digits>: the commit shown on the repository's page."
                self.problem(where, f"{given} names no exact revision", hint)
        elif "/" in value or value.startswith((".", "~")):
            return self.read_outside(value, where)
        else:
            hint = did_you_mean(value, sorted(known)) + " A path needs a '/'."
            self.problem(where, f"there is no stage '{shown(value, quoted=False)}'", hint)
        return None

    def read_outside(self, name: str, where: str) -> Outside | None:
        try:
            path = self.context().find(name)
            if path is None:
                self.problem(where, f"no such folder: {shown_path(name)}", "Correct the path.")
                return None
            if is_file(path / MANIFEST):
                manifest = read_manifest(path)
                return Outside(path, manifest.artifact_kind, manifest.artifact_id)
            kind = kind_of_folder(path)
            problem = None if kind in (Kind.TOKENIZER, Kind.ADAPTER) else weights_problem(path)
            if problem := problem or tokenizer_problem(path):
                self.problem(where, problem)
                return None
            return Outside(path, kind)
        except SlipwayError as error:
            self.problem(where, str(error))
            return None

    def order(self, names: list[str], upstream: Mapping[str, list[str]]) -> list[str]:
        """The stages, each after its inputs, otherwise as written. A cycle is a problem."""
        order, cycle = in_order(names, upstream)
        if cycle:
            self.problem(
                f"stages.{cycle[0]}.inputs",
                f"the stages wait for each other: {escaped(' <- '.join(cycle))}",
                "Remove one of these inputs.",
            )
        return order

    def check_outputs(self, outputs: list[Any], names: list[str], upstream: Mapping[str, list[str]]) -> None:
        for index, output in enumerate(outputs):
            if output not in names:
                what = f"there is no stage '{shown(output, quoted=False)}'"
                self.problem(f"outputs.{index}", what, did_you_mean(str(output), names))
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
                what = f"there is no stage {shown(spec.kind)}"
                self.problem(f"stages.{name}.kind", what, did_you_mean(spec.kind, self.stages))
                continue
            params = self.check(stage.params, spec.params, f"stages.{name}.params")
            resources = self.resources.read(name, stage, spec, common)
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
                path = source.path if isinstance(source, Outside) else None
                self.problem(
                    f"stages.{name}.inputs.{role}",
                    f"needs {wanted}, and {given} {kind}",
                    how_to_give(kind, stage, role, path, given) or kind_hint(declared, kinds, name),
                )
        for role, declared in stage.inputs.items():
            if not declared.optional and role not in spec.inputs:
                wanted = " or ".join(sorted(declared.kinds))
                self.problem(f"stages.{name}.inputs.{role}", f"is required: {wanted}", kind_hint(declared, kinds, name))
        return found


def kind_hint(declared: Input, kinds: Mapping[str, Kind], asking: str) -> str:
    """Which other stages of the recipe would fit."""
    fitting = [name for name, kind in kinds.items() if kind in declared.kinds and name != asking]
    return escaped(f"These stages would fit: {', '.join(fitting)}.") if fitting else "Add a stage that makes one."
