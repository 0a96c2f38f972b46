"""What the commands print of plans, artifacts and stages: pure functions from these to lines."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.errors import ArtifactError
from pipeline.figures import number, seconds, size, table
from pipeline.running.plan import Action, Plan
from pipeline.settings.paths import nearest_there
from pipeline.settings.strict import documentation, models_in
from pipeline.stage import Estimate, Stage
from pipeline.store.artifact import MANIFEST, Kind, added, intruders, read_manifest
from pipeline.store.proofs import prove
from pipeline.store.store import Store, is_there


def arithmetic(estimate: Estimate, world_size: int) -> str:
    """Parameters, tokens, steps, batch, memory and disk of a step, as far as they are known, in one line."""
    parts = []
    if estimate.parameters:
        parts.append(f"{number(estimate.parameters)} parameters{share_trained(estimate)}")
    if estimate.train_tokens:
        parts.append(f"{number(estimate.train_tokens)} tokens")
    if estimate.optimizer_steps:
        parts.append(f"{number(estimate.optimizer_steps)} steps")
    if estimate.global_batch_size and estimate.micro_batch_size and estimate.accumulation:
        factors = f"{estimate.micro_batch_size} x {estimate.accumulation} x {world_size}"
        parts.append(f"batch {estimate.global_batch_size} = {factors} (micro x accumulation x processes)")
    if estimate.memory_bytes_per_rank:
        parts.append(f"about {size(estimate.memory_bytes_per_rank)} memory per rank")
    if estimate.disk_bytes:
        parts.append(f"{size(estimate.disk_bytes)} on disk")
    return ", ".join(parts)


def share_trained(estimate: Estimate) -> str:
    """How many of the parameters are trained, where not all of them are."""
    trained = estimate.trained_parameters
    if trained is None or not estimate.parameters:
        return ""
    return f" ({trained:,} trained, {trained / (estimate.parameters + (estimate.added_parameters or 0)):.3%})"


WIDTH = 100


def plan_lines(plan: Plan, store: Store) -> list[str]:
    """A line per step (action, reason), under it the arithmetic and notes of the steps that will run; at the end the disk."""
    lines = []
    width = max(len(step.name) for step in plan.steps)
    for step in plan.steps:
        lines.append(f"{step.name:<{width}}  {step.action:<7}  {step.artifact_id[:8]}  {step.reason}")
        detail = arithmetic(step.estimate, step.recipe_step.resources.world_size)
        if detail and step.action is not Action.SKIP:
            lines.append(f"{'':<{width}}           {detail}")
        if step.action is not Action.SKIP:
            lines += [f"{'':<{width}}           note: {note}" for note in step.estimate.notes or ()]
    counts = {action: sum(step.action is action for step in plan.steps) for action in Action}
    words = {action: f"to {action}" for action in Action} | {Action.BLOCKED: "blocked"}
    lines.append(", ".join(f"{count} {words[action]}" for action, count in counts.items() if count))
    needed = sum(step.estimate.disk_bytes or 0 for step in plan.steps if step.action is not Action.SKIP)
    place = nearest_there(store.folder)
    wanted = f"at least {size(needed)} for models and data, " if needed else ""
    lines.append(f"disk: {wanted}{size(shutil.disk_usage(place).free)} free in {store.folder}")
    return lines


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    steps = []
    for step in plan.steps:
        estimate = {
            k: v for k, v in vars(step.estimate).items() if v is not None and k not in ("architecture", "folder")
        }
        steps.append(
            {
                "name": step.name,
                "stage": step.recipe_step.stage.kind,
                "action": step.action.value,
                "reason": str(step.reason),
                "artifact_id": step.artifact_id,
                "inputs": dict(step.input_ids),
                "processes": step.recipe_step.resources.world_size,
                "estimate": estimate,
            }
        )
    return {"recipe": plan.recipe.name, "path": str(plan.recipe.path), "steps": steps}


def lineage_lines(store: Store, name: str) -> list[str]:
    """The tree of an artifact's inputs; one that stands twice is drawn once."""
    artifact_id, folder = store.resolve(name)
    lines: list[str] = []
    drawn: set[str] = set()

    def draw(label: str, artifact_id: str, path: Path, rest: str) -> None:
        if not is_there(path / MANIFEST):
            lines.append(f"{label}{artifact_id}")
            return
        try:
            manifest = read_manifest(path)
        except ArtifactError as error:
            lines.append(f"{label}{artifact_id[:12]}  {error}")
            return
        again = " (above)" if artifact_id in drawn else ""
        lines.append(f"{label}{manifest.step}  {manifest.stage} v{manifest.stage_version}  {artifact_id[:12]}{again}")
        if again:
            return
        drawn.add(artifact_id)
        below = sorted(manifest.input_ids.items()) + sorted(manifest.source_digests.items())
        for index, (role, input_id) in enumerate(below):
            branch, trunk = ("`-- ", "    ") if index == len(below) - 1 else ("|-- ", "|   ")
            draw(f"{rest}{branch}{role}: ", input_id, store.artifact_folder(input_id), rest + trunk)

    draw("", artifact_id, folder, "")
    return lines


def show_lines(store: Store, name: str) -> list[str]:
    artifact_id, folder = store.resolve(name)
    manifest = read_manifest(folder)
    facts = manifest.facts.model_dump(exclude_none=True)
    lines = [
        f"{manifest.step}: {manifest.artifact_kind} made by {manifest.stage} version {manifest.stage_version}",
        f"  id        {artifact_id}",
        f"  folder    {folder}",
        f"  recipe    {manifest.recipe}, seed {manifest.seed}",
        f"  made      {manifest.created_at} in {seconds(manifest.wall_seconds)}, {manifest.world_size} process(es) on {manifest.device}",
        f"  commit    {manifest.git_commit or 'unknown'}{' (with changes)' if manifest.git_dirty else ''}",
    ]
    for title, block in (
        ("inputs", manifest.input_ids),
        ("metrics", {k: number(v) for k, v in manifest.metrics.items()}),
        ("facts", facts),
        ("params", manifest.params),
        ("files", {k: f"{size(v.size)}  {v.sha256[:16]}" for k, v in manifest.files.items()}),
        ("libraries", manifest.library_versions),
        ("environment", manifest.environment),
    ):
        if block:
            lines.append(f"  {title}")
            width = max(len(str(key)) for key in block)
            lines += [f"    {key:<{width}}  {value}" for key, value in block.items()]
    return lines


def verify_lines(store: Store, name: str) -> tuple[list[str], bool]:
    """What differs from the manifest, and whether nothing does that matters to who reads the artifact."""
    artifact_id, folder = store.resolve(name)
    manifest = read_manifest(folder)
    head = f"{artifact_id[:12]} {manifest.step}"
    damage = [f"{head}: {file} {what}" for file, what in prove(folder, manifest, again=True).items()]
    read = intruders(folder, manifest.files)
    others = [file for file in added(folder, manifest.files) if file not in read]
    notes = [f"{head}: note: {file} was added; nothing reads it" for file in others]
    strangers = [f"{head}: {file} was added, and would be read: move it elsewhere" for file in read]
    if damage:
        hint = "Run the recipe again: it makes the artifact anew, as `slipway plan` now says."
        if folder.absolute().parent != store.artifacts:
            hint = "It is a copy outside the store: copy the artifact again. A recipe that names it takes it for another input."
        return [*damage, *strangers, *notes, hint], False
    count = len(manifest.files)
    whole = f"{head}: all {count} files ({size(manifest.total_bytes)}) are as they were written"
    return [whole, *strangers, *notes], not strangers


def stage_table(stages: Mapping[str, Stage]) -> list[str]:
    rows = []
    for stage in stages.values():
        inputs = ", ".join(
            f"{role}{'?' if one.optional else ''}{'...' if one.many else ''}" for role, one in stage.inputs.items()
        )
        output = stage.output.value if isinstance(stage.output, Kind) else "depends on params"
        rows.append([stage.kind, inputs or "-", output, stage.summary])
    return [
        *table(rows, ("stage", "inputs", "makes", "what it does")),
        "",
        "inputs: ? may be absent, ... takes several",
    ]


def stage_lines(stage: Stage) -> list[str]:
    """One stage's inputs and params, as documented in its params model."""
    where = "any number of processes" if stage.distributed else "one process"
    lines = [f"{stage.kind} (version {stage.version}, runs in {where}): {stage.summary}", "", "inputs"]
    for role, one in stage.inputs.items():
        marks = [mark for mark, holds in (("may be absent", one.optional), ("takes several", one.many)) if holds]
        lines.append(f"  {role}: {' or '.join(sorted(one.kinds))}{f' ({chr(44).join(marks)})' if marks else ''}")
    if not stage.inputs:
        lines.append("  none")
    lines += ["", "params", *field_lines(stage.params, "  ", set())]
    return lines


def field_lines(model: type[BaseModel], indent: str, seen: set[type[BaseModel]]) -> list[str]:
    lines = []
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else f"default {default_text(info)}"
        lines.append(f"{indent}{name}: {type_text(info.annotation)}{range_text(info.metadata)}, {default}")
        width = WIDTH - len(indent) - 4
        lines += [f"{indent}    {line}" for line in textwrap.wrap(documentation(model).get(name, ""), width)]
        for inner in models_in(info.annotation):
            if inner not in seen:
                lines.append(f"{indent}    {inner.__name__}:")
                lines += field_lines(inner, indent + "      ", seen | {inner})
    return lines


def default_text(info: Any) -> str:
    value = info.get_default(call_default_factory=True) if info.default is PydanticUndefined else info.default
    return "none" if value is None else str(value)


def range_text(metadata: Sequence[Any]) -> str:
    """` (0 or from 0.001 to 100)`: between which numbers a value must lie, as far as it is said."""
    found: dict[str, Any] = {}
    for each in metadata:
        for constraint in getattr(each, "metadata", [each]):
            names = ("ge", "gt", "le", "lt")
            found |= {name: getattr(constraint, name) for name in names if hasattr(constraint, name)}
            if least := getattr(getattr(constraint, "func", None), "least", None):
                found["least"] = least
    least = f"0 or from {found['least']:g}" if "least" in found else ""
    if found.get("ge", 0) < 0:
        least = f"from {found['ge']:g}"
    words = {"ge": "from {:g}", "gt": "above {:g}", "le": "to {:g}", "lt": "below {:g}"}
    said = [words[name].format(found[name]) for name in words if name in found and not (least and name in ("ge", "gt"))]
    text = " ".join(filter(None, [least, *said]))
    return f" ({text})" if text else ""


def type_text(annotation: Any) -> str:
    """The type as one writes it, without what it is validated by."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0]) + range_text(arguments[1:])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_text(argument) for argument in arguments)}]"
    return "None" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))
