"""The models that an evaluation measures, adapters on their base among them."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ArtifactError, Problem, shown_path
from pipeline.settings.paths import holds_file
from pipeline.stage import Context
from stages.lib.measuring.compared_models import Subject
from stages.lib.models.adapters.folders import BASE, adapter_config, adapter_folder, unreadable_adapter
from stages.lib.models.adapters.saving import require_base, said_of_base
from stages.lib.models.config import read_config
from stages.lib.preferring.reward_reading import reading_in, with_penalty


def open_subjects(ctx: Context) -> list[Subject]:
    """All of `models`, and all of `adapters` on the model that they were trained on.

    Raises `ArtifactError` where that model is not among the inputs, or cannot be told.
    """
    subjects = [Subject.open(name, folder) for name, folder in ctx.group("models").items()]
    for name, folder in ctx.group("adapters").items():
        where = f"inputs.adapters.{name}"
        if problems := unreadable_adapter(folder, where):
            raise ArtifactError(*problems)
        role = base_role(ctx, adapter_folder(folder), where)
        if said := require_base(adapter_folder(folder), ctx.inputs[role], ctx.origin(role)[0], where):
            ctx.journal.note(f"{name}: {said}")
        subjects.append(Subject.open(name, ctx.inputs[role], folder))
    return subjects


def base_role(ctx: Context, adapter: Path, where: str) -> str:
    """The role of the model that an adapter belongs to: `base` where it is given, else one of `models`.

    By what the adapter records of its base's weights; one without such a record, by the name of its base, or, where there is
    only one, that one. Raises `ArtifactError` where none of them is.
    """
    if "base" in ctx.inputs:
        return "base"
    roles = [role for role, folder in ctx.inputs.items() if role.startswith("models.") and has_plain_weights(folder)]
    if fitting := [role for role in roles if belongs(ctx, adapter, role)]:
        return fitting[0]  # several are copies of each other
    if len(roles) == 1:
        return roles[0]  # and `require_base` says what is wrong or to be said
    said = adapter_config(adapter).get("base_model_name_or_path")
    what = f"was trained on {shown_path(said) if said else 'a model that it does not name'}, and no model of inputs.models is that"
    raise ArtifactError(Problem(where, what, "Name the model that it was trained on as inputs.base."))


def belongs(ctx: Context, adapter: Path, role: str) -> bool:
    """Whether the adapter says that it was trained on this input."""
    folder, name = ctx.inputs[role], ctx.origin(role)[0]
    if not holds_file(adapter, BASE):
        return bool(adapter_config(adapter).get("base_model_name_or_path")) and not said_of_base(adapter, folder, name)
    try:
        return not require_base(adapter, folder, name)
    except ArtifactError:
        return False


def has_plain_weights(folder: Path) -> bool:
    """Whether the weights are those that an adapter can be put on, and not quantized ones."""
    return not read_config(folder).get("quantization_config")


def open_judges(ctx: Context, uncertainty_penalty: float) -> list[Subject]:
    """The reward models, each with how it is read. Raises `ArtifactError` where uncertainty is to count and there is one head."""
    judges = [Subject.open(name, folder) for name, folder in ctx.group("reward_models").items()]
    for each in judges:
        reading = reading_in(read_config(each.folder), str(each.folder))
        each.reading = with_penalty(reading, uncertainty_penalty, f"inputs.reward_models.{each.name}")
    return judges
