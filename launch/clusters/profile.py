"""A cluster's profile: what a job must say to be let in. One YAML file, here or anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.errors import Problem, RecipeError, did_you_mean
from pipeline.settings.paths import is_file
from pipeline.settings.strict import Reading, Strict, validate
from pipeline.settings.yaml_loader import load_yaml

PROFILES = Path(__file__).parent
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)


def require_plain(value: str) -> str:
    if not re.fullmatch(r"[\w.,:@/+=^%*&|()\[\]-]+", value, re.ASCII):
        raise ValueError("may hold letters, digits and .,:@/+=^%*&|()[]- only, and no spaces")
    return value


def require_time(value: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", value, re.ASCII):
        raise ValueError(
            'is no time: write minutes, "hours:minutes:seconds" or "days-hours:minutes:seconds", in quotes'
        )
    return value


def minutes(time: str) -> float:
    """How many minutes a time of SLURM means: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def require_gpus(value: str) -> str:
    if value.partition(":")[0] not in ("gpus-per-node", "gres"):
        raise ValueError("must be gpus-per-node or gres, or with a type gres:a100")
    return require_plain(value)


def require_one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value


def require_option(value: str) -> str:
    if not re.match(r"--?[A-Za-z]", require_one_line(value)):
        raise ValueError("must be an option of sbatch, such as --exclusive")
    return value


def require_variables(value: dict[str, str]) -> dict[str, str]:
    for name, each in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name of a variable")
        if SECRET.search(name):
            raise ValueError(
                f"{name} looks like a secret, and scripts are files: export it where you submit, sbatch takes it along"
            )
        require_one_line(each)
    return value


Word = Annotated[str, AfterValidator(require_plain)]
Time = Annotated[str, AfterValidator(require_time)]
Gpus = Annotated[str, AfterValidator(require_gpus)]
OptionLine = Annotated[str, AfterValidator(require_option)]
ShellLine = Annotated[str, AfterValidator(require_one_line)]


class Request(Strict):
    """What is asked of the scheduler; a field that is not given asks for nothing."""

    partition: Word | None = None
    """One or several, separated by commas."""
    account: Word | None = None
    """Whom the time is charged to."""
    qos: Word | None = None
    """Quality of service."""
    time: Time | None = None
    """Longest time of one job, as SLURM writes it: "24:00:00". A stage that needs more saves before, is queued again and goes on."""
    constraint: Word | None = None
    """Features that the nodes must have."""
    reservation: Word | None = None
    """The reservation to run in."""
    memory: Word | None = None
    """Memory per node, such as 64G; 0 for all of it."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores per node. None: what the partition gives."""
    gpus: Gpus | None = None
    """How GPUs are asked for, where a step uses them: `gpus-per-node`, or `gres`; with a colon the type, such as `gres:a100`."""
    sbatch: list[OptionLine] = []
    """More options of sbatch, a line each."""


class Profile(Request):
    """A cluster. What stands at the top holds for every step, `cpu` for those that use no GPU, `stages` for kinds of stages."""

    cpu: Request = Request()
    """What differs for steps that use no GPU: data stages, and what has `device: cpu`."""
    stages: dict[str, Request] = {}
    """What differs for a kind of stage, by its kind."""
    setup: list[ShellLine] = []
    """Lines of shell before each job: `module load cuda/12.4`."""
    environment: Annotated[dict[str, str], AfterValidator(require_variables)] = {}
    """Variables that each job gets, taken literally."""
    interface: Word | None = None
    """The network interface between nodes, such as ib0, for NCCL and gloo."""
    warn_before_end_seconds: int = Field(default=120, ge=10)
    """How long before its time is up a job is told to save. It must be enough for a step, a checkpoint and half a minute."""
    crash_requeues: int = Field(default=0, ge=0)
    """How often a job that crashed is queued again, beside those that saved and go on. A mistake of the user never is."""
    unsaved_requeues: int = Field(default=3, ge=0)
    """How often a job is queued again that had to stop with nothing saved, as a data stage has nothing to save."""

    def request(self, kind: str, *, on_gpu: bool) -> Request:
        """What a job asks for: of its kind of stage, of CPU jobs, of all, the first that says something. Extra lines add up."""
        levels = [self.stages.get(kind, Request()), *([] if on_gpu else [self.cpu]), self]
        names = [name for name in Request.model_fields if name != "sbatch"]
        found: dict[str, Any] = {
            name: next((getattr(level, name) for level in levels if getattr(level, name) is not None), None)
            for name in names
        }
        return Request(**found, sbatch=[line for level in reversed(levels) for line in level.sbatch])


def known_profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, kinds: Mapping[str, Any]) -> Profile:
    """The profile of this name or in this file, checked. Raises one `RecipeError` with all that is wrong."""
    path = PROFILES / f"{name}.yaml"
    if "/" in name or name.endswith((".yaml", ".yml")) or not is_file(path):
        found = Reading([Path.cwd()]).find_file(name) if name else None
        if found is None:
            hint = f"{did_you_mean(name, known_profiles())} Name one of these, or write the path of your own YAML file."
            raise RecipeError(Problem(name or "--cluster", "there is no such profile", hint))
        path = found
    document, problems = load_yaml(path)
    if not problems and not isinstance(document, dict):
        problems = [Problem(str(path), "is no profile: a mapping of fields is expected at its top")]
    profile = None
    if not problems:
        profile, problems = validate(Profile, document, path.name, Reading([path.parent]))
        problems = [replace(each, where=each.where.replace(f"{path.name}.", f"{path}: ", 1)) for each in problems]
    if profile is not None:
        problems = [
            Problem(f"{path}: stages.{kind}", "there is no stage of this kind", did_you_mean(kind, kinds))
            for kind in profile.stages
            if kind not in kinds
        ]
    if profile is None or problems:
        raise RecipeError(*problems)
    return profile
