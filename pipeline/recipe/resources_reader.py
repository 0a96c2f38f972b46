"""Where and how the steps of a recipe run, checked: common resources and a step's own, launcher, memory layout, trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import PathError, Problem, did_you_mean, shown
from pipeline.recipe.checking import Checking
from pipeline.recipe.schema import StageSpec
from pipeline.settings.resources import LAYOUTS, OF_ONE_PROCESS_TOO, Resources, find_layout
from pipeline.settings.strict import Strict, validate
from pipeline.stage import Stage


class HasOptions(Protocol):
    """What a recipe's reader needs of a launcher or tracker; `launch/` and `trackers/` have them."""

    @property
    def options(self) -> type[Strict]:
        """The fields that a recipe may give it."""


class IsTracker(HasOptions, Protocol):
    """What a recipe's reader needs of a tracker; `trackers/` has them."""

    @classmethod
    def missing(cls) -> str:
        """What is not installed that it needs, and how to get it; empty where all is there."""


@dataclass
class ResourcesReader(Checking):
    """Reads the resources of one recipe; what is wrong gathers in `problems`."""

    launchers: Mapping[str, HasOptions]
    trackers: Mapping[str, IsTracker]

    def read(self, name: str, stage: Stage, spec: StageSpec, common: Mapping[str, Any]) -> Resources | None:
        where = f"stages.{name}.resources"
        shared = common if stage.distributed else {k: v for k, v in common.items() if k in OF_ONE_PROCESS_TOO}
        merged = {**shared, **spec.resources}
        own, problems = self.check_all(merged, where)
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
        try:
            layout = None if own.deepspeed is None else find_layout(own.deepspeed, self.context())
        except PathError as error:
            self.problem(f"{where}.deepspeed", str(error))
            return None
        if own.deepspeed is not None and layout is None:
            known = sorted(path.stem for path in LAYOUTS.glob("*.json"))
            what = f"there is no memory layout {shown(own.deepspeed)}"
            self.problem(f"{where}.deepspeed", what, did_you_mean(own.deepspeed, known))
        update = {"launcher": launcher, **({"deepspeed": str(layout)} if layout else {})}
        if "tracking" in spec.resources:
            update["tracking"] = self.read_tracking(own.tracking, f"{where}.tracking")
        return own.model_copy(update=update)

    def check_all(self, value: Mapping[str, Any], where: str) -> tuple[Resources | None, list[Problem]]:
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
            self.problem(where, f"there is no launcher {shown(name)}", did_you_mean(name, self.launchers))
        elif given := resources.launcher_options:
            options = self.check(self.launchers[name].options, given, where)
            return {"kind": name, **options.model_dump(mode="json", exclude_unset=True)} if options else name
        return name

    def read_tracking(self, given: Any, where: str) -> dict[str, dict[str, Any]]:
        """Tracker -> its options, as they go into the job."""
        if not isinstance(given, Mapping):
            if given is not None:
                hint = f"Write `tracking: {{{next(iter(self.trackers), 'tensorboard')}: {{}}}}`."
                self.problem(where, f"must be a mapping of trackers, not {shown(given)}", hint)
            return {}
        found = {}
        for name, options in given.items():
            if name not in self.trackers:
                self.problem(where, f"there is no tracker {shown(name)}", did_you_mean(str(name), self.trackers))
            elif missing := self.trackers[name].missing():
                self.problem(f"{where}.{name}", missing, f"Or leave it out: --set '{where}={{}}'.")
            elif checked := self.check(
                self.trackers[name].options, {} if options is None else options, f"{where}.{name}"
            ):
                found[str(name)] = checked.model_dump(mode="json", exclude_unset=True)
        return found
