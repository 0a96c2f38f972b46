"""What a stage is, and what it receives when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.settings.resources import Resources
from pipeline.settings.strict import Strict
from pipeline.store.artifact import Facts, Kind
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.journal import Journal
from pipeline.store.numbers import require_finite

BASE_ROLES = ("model", "encoder", "student")
"""The roles of the model that a step goes on from, and whose number format, licence and origin its own model has."""


EXTENDS = "extends"
"""The role of a finished training of the same stage that a step makes longer: it goes on from the last checkpoint of that one."""


@dataclass(frozen=True)
class Input:
    """One role of a stage's inputs: the kinds it accepts, whether it may be absent, whether it takes several.

    A role that takes several is a mapping in the recipe (`models: {base: base, chat: sft}`) and reaches the stage
    as `models.base` and `models.chat`.
    """

    kinds: frozenset[Kind]
    optional: bool = False
    many: bool = False


def accepts(*kinds: Kind, optional: bool = False, many: bool = False) -> Input:
    return Input(frozenset(kinds), optional=optional, many=many)


@dataclass(frozen=True)
class World:
    """The processes of this job: `rank` of `size`, and `local_rank` on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Estimate:
    """What `plan` can say of a step's artifact and of its run beforehand. None where it cannot be known yet."""

    parameters: int | None = None
    trained_parameters: int | None = None
    """Those that the step trains, where an adapter or a part of the model is trained; None where all of them are."""
    added_parameters: int | None = None
    """Those of the trained ones that are an adapter's, and not the model's."""
    adapter: str | None = None
    """Of an artifact that is an adapter alone: its method."""
    adapter_weights: int | None = None
    """Of an artifact that is an adapter, or has one beside its model: how many weights the adapter has."""
    architecture: Mapping[str, Any] | None = None
    """The transformers config of the model, as a flat mapping."""
    vocabulary_size: int | None = None
    train_rows: int | None = None
    train_tokens: int | None = None
    sequence_length: int | None = None
    optimizer_steps: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    accumulation: int | None = None
    memory_bytes_per_rank: int | None = None
    disk_bytes: int | None = None
    folder: Path | None = None
    """Where it lies, if it is there already: what its files say of it can be read."""
    notes: tuple[str, ...] | None = None
    """Sentences on the run that a user should read before it starts."""


@dataclass(frozen=True)
class Extended:
    """The training that the input `extends` names, as far as it is known before the step runs."""

    params: Mapping[str, Any]
    steps_made: int | None = None
    """Optimizer steps at its last checkpoint; None where that is not written yet."""
    total_steps: int | None = None
    """Those that it was to make."""


@dataclass(frozen=True)
class Forecast:
    """What `Stage.estimate` and `Stage.check` receive: what is known of the step before it runs.

    `inputs` holds, per role, what the artifact's manifest says where the artifact exists already, and what the
    upstream step's own estimate says where it does not.
    """

    params: Any
    resources: Resources
    inputs: Mapping[str, Estimate]
    extended: Extended | None = None
    """What it makes longer, if that is what it does."""


@dataclass(frozen=True)
class Result:
    """What a stage hands to the commit: `metrics` (flat name -> number) and `facts` for its consumers.

    Raises `DataError` if a number in them is not finite.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        require_finite(self.metrics, "metrics")
        require_finite(self.facts.fixed_prompt_scores or {}, "fixed_prompt_scores")


@dataclass(frozen=True)
class Context:
    """What `run` receives besides its params."""

    inputs: Mapping[str, Path]
    """Role (`model`, or `models.base` for a role that takes several) -> folder of the artifact."""
    out: Path
    """An empty folder that becomes the artifact when `run` returns. Rank 0 writes it; all ranks see it."""
    work: Path
    """Scratch space of this step. It survives a restart."""
    resume: Path | None
    """The newest checkpoint that verified, or None."""
    checkpoints: Checkpoints
    seed: int
    resources: Resources
    journal: Journal
    world: World
    stop_requested: Callable[[], bool]
    """True once this process was asked to save and stop. Ranks must agree before they act on it. All come to the same calls."""
    going_on_alone: Callable[[], bool] = lambda: False
    """The same answer, asked within what this process does by itself for long: that it goes on is news."""
    hub: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Role -> (repository, revision) of the inputs that were brought from the hub."""
    extends: Path | None = None
    """The last checkpoint of the training that the input `extends` names; None without that input."""

    @property
    def base(self) -> Path | None:
        """The folder of the model that this step goes on from; None where it makes a new one."""
        return next((self.inputs[role] for role in BASE_ROLES if role in self.inputs), None)

    def origin(self, role: str) -> tuple[str, str | None]:
        """What others may find an input under: repository and revision of the hub, or its folder on this machine."""
        return self.hub.get(role) or (str(self.inputs[role]), None)

    def group(self, role: str) -> dict[str, Path]:
        """Name -> folder for a role that takes several."""
        prefix = f"{role}."
        return {name.removeprefix(prefix): path for name, path in self.inputs.items() if name.startswith(prefix)}


def nothing_to_check(forecast: Forecast) -> list[Problem]:
    return []


def nothing_known(forecast: Forecast) -> Estimate:
    return Estimate()


@dataclass(frozen=True)
class Stage:
    """A function from artifacts to one artifact, with everything `plan` must know about it."""

    kind: str
    version: int
    """Raised when the same params and inputs give another result: old artifacts are then made anew."""
    summary: str
    """One line for `slipway stages`."""
    params: type[Strict]
    inputs: Mapping[str, Input]
    output: Kind | Callable[[Any, Mapping[str, Kind]], Kind]
    """The kind of the artifact; a function of (params, kinds of inputs) where it depends on them. It may raise
    `RecipeError`, or `KeyError` where an input is missing, which is reported in any case."""
    run: Callable[[Context, Any], Result]
    headline: tuple[str, ...] = ()
    """The metrics that the closing table shows, baselines beside what they measure."""
    distributed: bool = False
    """Whether it may run in more than one process."""
    estimate: Callable[[Forecast], Estimate] = nothing_known
    check: Callable[[Forecast], list[Problem]] = nothing_to_check
    """What is wrong with the params given the inputs, found before anything runs. `where` is relative to the stage."""

    may_extend: frozenset[str] = frozenset()
    """The params in which a step may differ from the training that its input `extends` names."""

    def output_kind(self, params: Any, inputs: Mapping[str, Kind]) -> Kind:
        return self.output if isinstance(self.output, Kind) else self.output(params, inputs)
