"""A step that makes a finished training longer: whether it is the same training, and whether that one's last checkpoint is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError, Problem
from pipeline.recipe.recipe import Outside, RecipeStep, Upstream
from pipeline.running.reasons import difference, show
from pipeline.stage import EXTENDS, Extended
from pipeline.store.artifact import Manifest, read_manifest
from pipeline.store.checkpoints import Newest
from pipeline.store.resumable import Saved, converted, mismatch, read_saved, spread_of, way_out
from pipeline.store.works import last_checkpoint_of

if TYPE_CHECKING:
    from pipeline.running.plan import Step

INPUT = f"inputs.{EXTENDS}"
FROM_THE_BEGINNING = f"or leave out the input {EXTENDS}: then all steps are trained from the beginning"


def identity_of_manifest(manifest: Manifest) -> dict[str, Any]:
    """What the artifact's id was made of: its params with digests in the place of outside files."""
    params = with_digests(manifest.params, manifest.source_digests)
    return {
        "kind": manifest.stage,
        "version": manifest.stage_version,
        "params": params,
        "seed": manifest.seed,
        "inputs": manifest.input_ids,
    }


def with_digests(value: Any, digests: Mapping[str, str], prefix: str = "") -> Any:
    """Params with `digests[dotted name]`, without the path behind it, in the place of what is named there."""
    if isinstance(value, Mapping):
        return {key: with_digests(item, digests, f"{prefix}.{key}" if prefix else key) for key, item in value.items()}
    if isinstance(value, list):
        return [with_digests(item, digests, f"{prefix}.{number}") for number, item in enumerate(value)]
    return digests[prefix].partition(" ")[0] if prefix in digests else value


def other_training(step: RecipeStep, own: Mapping[str, Any], extended: Mapping[str, Any]) -> list[Problem]:
    """In what a step differs from the training that it is to make longer, by their identities, where it may not."""
    if own["kind"] != extended["kind"]:
        what = f"names what {extended['kind']} makes, and {own['kind']} can make only a training of its own longer"
        return [Problem(INPUT, what, "Name a step of the same kind, or take it as the model to begin with.")]
    found = difference(extended, own)
    problems = []
    if found.version:
        what = f"was made by version {found.version[0]} of the stage {own['kind']}, which is {found.version[1]} now"
        problems.append(Problem(INPUT, what, f"Make it anew; {FROM_THE_BEGINNING}."))
    hint = "Say here what is said there, or take what that step has made as the model to begin with"
    for name, before, now in found.changed:
        if name.partition(".")[0] not in step.stage.may_extend:
            where = name if name == "seed" else f"params.{name}"
            may = ", ".join(sorted(step.stage.may_extend))
            what = f"is {show(now)}, and {show(before)} in what is extended, which would be another training"
            problems.append(Problem(where, what, f"{hint}. Only these may differ: {may}."))
    for role in found.changed_inputs:
        if role != EXTENDS:
            problems.append(Problem(f"inputs.{role}", "is not that of what is extended", f"{hint}."))
    return problems


def extension_of(
    step: RecipeStep, own: Mapping[str, Any], planned: Mapping[str, Step], place: str
) -> tuple[Extended | None, list[Problem]]:
    """What is known of the training that the step makes longer (None if none), and why it cannot be that one.

    `own` is the step's identity, `place` where the input lies or is to lie.
    """
    source = step.inputs.get(EXTENDS)
    if source is None:
        return None, []
    if isinstance(source, Upstream):
        theirs, problems = planned[source.step].identity, problems_of_maker(step, planned[source.step])
    elif isinstance(source, Outside) and source.artifact_id and source.lies_in_store:
        theirs, problems = identity_of_manifest(read_manifest(source.path)), []
    else:
        hint = "Name a step, or an artifact's folder in its store, or take it as the model to begin with."
        return None, [Problem(INPUT, f"{source} comes without the checkpoints of its training", hint)]
    problems = problems + other_training(step, own, theirs)
    return extended_of(theirs["params"], Path(place)), problems


def problems_of_maker(step: RecipeStep, maker: Step) -> list[Problem]:
    """Why what a step leaves could not be gone on from, where it has not run yet."""
    if maker.manifest is not None:
        return []
    theirs, own, problems = maker.recipe_step.resources, step.resources, []
    if not theirs.keep_last_checkpoint:
        what = f"names {maker.name}, which would leave no checkpoint to go on from"
        hint = f"Set stages.{maker.name}.resources.keep_last_checkpoint to true; {FROM_THE_BEGINNING}."
        problems.append(Problem(INPUT, what, hint))
    before, now = spread_of(theirs), spread_of(own)
    if before is None or now is None:
        return problems
    if reason := mismatch(Saved(before.world_size, before.zero_stage, bound=before.bound), now):
        hint = f"Give both steps the same processes and deepspeed; {FROM_THE_BEGINNING}."
        problems.append(Problem("resources", f"the checkpoint of {maker.name} {reason}", hint))
    return problems


def extended_of(params: Mapping[str, Any], artifact: Path) -> Extended:
    """What is known of the training that made, or is to make, an artifact of a store."""
    newest = last_checkpoint_of(artifact, hashes=False)
    saved = read_saved(newest.path) if newest.path else None
    return Extended(params, saved.step, saved.total_steps) if saved else Extended(params)


def extended_checkpoint(step: RecipeStep, planned: Mapping[str, Step], place: str) -> Newest | None:
    """The last checkpoint of the training that the step makes longer, if that has ended already; None if it extends none.

    `place` is where the input lies.
    """
    source = step.inputs.get(EXTENDS)
    if source is None or (isinstance(source, Upstream) and planned[source.step].manifest is None):
        return None
    return last_checkpoint_of(Path(place), hashes=False)


def refused_extension(step: RecipeStep, newest: Newest | None, place: str) -> str | None:
    """Why the step cannot go on from that checkpoint, and what to do; None if it can, or extends none."""
    if newest is None:
        return None
    if newest.path is None:
        return no_checkpoint(Path(place), newest.passed_over)
    saved, now = read_saved(newest.path), spread_of(step.resources)
    reason = mismatch(saved, now) if now is not None else None
    if reason is None:
        return None
    return f"the checkpoint of input '{EXTENDS}' {reason}: add {way_out(saved, step.resources, step.name)}; {FROM_THE_BEGINNING}"


def converted_extension(step: RecipeStep, newest: Newest | None) -> str:
    """What changes where that checkpoint is of other processes, or of another memory layout; "" if nothing does."""
    now = spread_of(step.resources)
    if newest is None or newest.path is None or now is None:
        return ""
    said = converted(read_saved(newest.path), now)
    return f"the checkpoint of input '{EXTENDS}', {said}" if said else ""


def no_checkpoint(artifact: Path, passed_over: list[str]) -> str:
    said = f" ({'; '.join(passed_over[:3])})" if passed_over else ""
    return (
        f"input '{EXTENDS}' has left no checkpoint to go on from{said}: set resources.keep_last_checkpoint of the step that made"
        f" it to true and remove {artifact}, so that it is made anew, the same, and keeps it; {FROM_THE_BEGINNING}"
    )


def checkpoint_to_extend(artifact: Path, *, needed: bool) -> Path | None:
    """The checkpoint that a run begins with. Where it is `needed`, as there is none of its own yet, it is hashed.

    Raises `ArtifactError` if it is needed and not there.
    """
    newest = last_checkpoint_of(artifact, hashes=needed)
    if newest.path is None and needed:
        raise ArtifactError(Problem(INPUT, no_checkpoint(artifact, newest.passed_over)))
    return newest.path
