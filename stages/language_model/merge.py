"""`merge`: a causal model with the weights of an adapter, or of several, added, so that every stage takes it as any other model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.errors import ArtifactError, DataError, Problem, did_you_mean
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.formulas.bounds import SignedWeight
from stages.lib.models.adapters.folders import adapter_folder, nothing_to_merge, tokenizer_beside, unmergeable_adapter
from stages.lib.models.adapters.methods import UNMERGEABLE
from stages.lib.models.adapters.params import is_none, mergeable_methods
from stages.lib.models.generation import generation_notes
from stages.lib.models.published import PublishedDtype, PublishedParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class MergeParams(PublishedParams):
    """How adapters are added, and the merged model is published."""

    published_dtype: PublishedDtype | None = None
    """Number format of the weights that are published; they are added in fp32. null: the one that the model has."""
    weights: dict[str, SignedWeight] | None = Field(default=None, min_length=1, exclude_if=is_none)
    """Adapter of `adapters` -> how much of what it changes is added: 1 all, 0.5 half of it, below 0 the reverse. Every one needs its own. null: the mean, each by 1 / their number."""
    tokenizer_of: str | None = Field(default=None, exclude_if=is_none)
    """The adapter of `adapters` whose tokenizer and chat template the model gets. null: those of all, which must be the same."""


def estimate(forecast: Forecast) -> Estimate:
    model = forecast.inputs.get("model", Estimate())
    return Estimate(
        parameters=model.parameters,
        architecture=model.architecture,
        vocabulary_size=model.vocabulary_size,
        sequence_length=model.sequence_length,
        notes=tuple(generation_notes(model.folder)) or None,
    )


def check(forecast: Forecast) -> list[Problem]:
    """Whether one adapter is given or several with what is said of them, and what each lacks, as far as it is known."""
    params: MergeParams = forecast.params
    given = {role: each for role, each in forecast.inputs.items() if role.partition(".")[0] in ("adapter", "adapters")}
    names = [role.removeprefix("adapters.") for role in given if role != "adapter"]
    if not given or ("adapter" in given and names):
        what = "and adapters are both given" if given else "is missing, and so is adapters"
        hint = "Give one as `adapter: NAME`, or several to be mixed as `adapters: {one: NAME, other: NAME}`."
        return [Problem("inputs.adapter", what, hint)]
    problems = []
    if params.weights is not None and (wrong := sorted(set(params.weights) ^ set(names))):
        what = f"{', '.join(wrong)} stand on one side only: every one of `adapters` needs a weight, and nothing else"
        problems.append(Problem("params.weights", what, "Correct the names, or leave weights out: the mean."))
    if params.tokenizer_of is not None and params.tokenizer_of not in names:
        problems.append(
            Problem("params.tokenizer_of", "is none of `adapters`", did_you_mean(params.tokenizer_of, names))
        )
    for role, adapter in given.items():
        if adapter.folder is not None:
            problems += unmergeable_adapter(adapter.folder, f"inputs.{role}")
        elif adapter.adapter in UNMERGEABLE:
            problems.append(nothing_to_merge(adapter.adapter, f"inputs.{role}"))
    return problems


def run(ctx: Context, params: MergeParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.adapters.merging import mix_adapters
    from stages.lib.models.adapters.saving import require_base
    from stages.lib.models.formats import formats_to_publish, say_if_other
    from stages.lib.models.generation import note_generation
    from stages.lib.models.loading import count_parameters, load_model
    from stages.lib.models.publishing import publish, zeros_of
    from stages.lib.processes.joining import use_threads
    from stages.lib.text.tokenizers import tokenizer_facts

    use_threads(ctx.resources)
    source = ctx.inputs["model"]
    given = {role: path for role, path in ctx.inputs.items() if role.partition(".")[0] in ("adapter", "adapters")}
    if problems := [each for role, path in given.items() for each in unmergeable_adapter(path, f"inputs.{role}")]:
        raise ArtifactError(*problems)
    tokenizer = tokenizer_to_keep(given, source, params.tokenizer_of)
    formats = formats_to_publish(ctx, "fp32", params.published_dtype)
    note_generation(ctx)
    for role, path in given.items():
        if said := require_base(adapter_folder(path), source, ctx.origin("model")[0], f"inputs.{role}"):
            ctx.journal.note(said)

    def load() -> PreTrainedModel:
        return load_model(AutoModelForCausalLM, source)

    if "adapter" in given:
        merged = with_adapter_merged(load(), adapter_folder(given["adapter"]), "inputs.adapter")
    else:
        group = ctx.group("adapters")
        weights = params.weights or dict.fromkeys(group, 1 / len(group))
        folders = {name: (adapter_folder(path), weights[name]) for name, path in group.items()}
        merged = mix_adapters(load, with_adapter_merged, folders)
    changed, change = difference_of(load(), merged)
    if not changed:
        where = "inputs.adapter" if "adapter" in given else "inputs.adapters"
        hint = "Name an adapter that was trained."
        raise ArtifactError(Problem(where, "changes no weight of the model: what it adds is zero", hint))
    what = "the adapter changes" if "adapter" in given else f"the mixture of {len(given)} adapters changes"
    of = f"; tokenizer and chat template are an adapter's, from {tokenizer}" if tokenizer != source else ""
    ctx.journal.note(f"{what} {changed} weights, by {change:.2%} of their norm{of}")
    published = publish(merged, merged.state_dict(), tokenizer, ctx.out, formats=formats, may_be_zero=zeros_of(source))
    say_if_other(ctx, formats, published)
    facts = Facts(
        **tokenizer_facts(ctx.out), head_type="causal_lm", dtype=published, parameters=count_parameters(merged)
    )
    return Result({"changed_weights": changed, "relative_change": change}, facts)


STAGE = Stage(
    kind="merge",
    version=3,
    summary="a causal model with the weights of an adapter, or of a mixture of several, added",
    params=MergeParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "adapters": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True, many=True),
    },
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("changed_weights", "relative_change"),
    estimate=estimate,
    check=check,
)


def tokenizer_to_keep(given: Mapping[str, Path], base: Path, wanted: str | None) -> Path:
    """The folder whose tokenizer the merged model gets. Raises `DataError` where adapters bring different ones and none is named."""
    from stages.lib.text.tokenizers import chat_template_digest, load_tokenizer, tokenizer_digest

    folders = {role.removeprefix("adapters."): tokenizer_beside(path, base) for role, path in given.items()}
    if wanted is not None:
        return folders[wanted]
    known: dict[tuple[str, str | None], str] = {}
    for name, folder in sorted(folders.items()):
        tokenizer = load_tokenizer(folder)
        known.setdefault((tokenizer_digest(tokenizer), chat_template_digest(tokenizer)), name)
    if len(known) > 1:
        what = f"bring different tokenizers or chat templates: {' and '.join(known.values())}"
        hint = f"Write `tokenizer_of: {next(iter(known.values()))}`, or another: the one whose template the model gets."
        raise DataError(Problem("inputs.adapters", what, hint))
    return next(iter(folders.values()))


def with_adapter_merged(model: PreTrainedModel, adapter: Path, where: str) -> PreTrainedModel:
    """The model with the adapter's weights added. Raises `ArtifactError` unless each of them is, and none is lacking."""
    from stages.lib.models.adapters.merging import merged_in_place
    from stages.lib.models.adapters.opening import attached
    from stages.lib.models.adapters.saving import own_method

    adapted: Any = attached(model, adapter, where)
    if own_method(adapter) is not None:
        return adapted
    if not hasattr(adapted, "merge_and_unload"):
        kind = getattr(adapted.peft_config.get("default"), "peft_type", "this kind")
        what = f"is of the kind {kind}, which cannot be added to a model's weights"
        raise ArtifactError(Problem(where, what, f"Name an adapter with weights: {mergeable_methods()}."))
    return merged_in_place(adapted)


def difference_of(before: torch.nn.Module, after: torch.nn.Module) -> tuple[int, float]:
    """How many weights differ, and the norm of all differences as a fraction of the norm that these had before."""
    changed, moved, norm = 0, 0.0, 0.0
    old = before.state_dict()
    for name, tensor in after.state_dict().items():
        by = float((tensor - old[name]).double().norm() ** 2) if tensor.is_floating_point() else 0.0
        if by:
            changed, moved, norm = changed + 1, moved + by, norm + float(old[name].double().norm() ** 2)
    return changed, (moved / norm) ** 0.5 if norm else 0.0
