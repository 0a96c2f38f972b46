"""`merge`: a causal model with the weights of an adapter added, so that every stage takes it as any other model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError, Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.adapters.folders import adapter_folder, nothing_to_merge, tokenizer_beside, unmergeable_adapter
from stages.lib.models.adapters.methods import UNMERGEABLE
from stages.lib.models.adapters.params import mergeable_methods
from stages.lib.models.generation import generation_notes
from stages.lib.models.published import PublishedDtype, PublishedParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class MergeParams(PublishedParams):
    """How the merged model is published."""

    published_dtype: PublishedDtype | None = None
    """Number format of the weights that are published; they are added in fp32. null: the one that the model has."""


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
    """What the adapter's folder lacks, where it is there already; and whether its method has weights to merge."""
    adapter = forecast.inputs.get("adapter", Estimate())
    if adapter.folder is not None:
        return unmergeable_adapter(adapter.folder)
    return [nothing_to_merge(adapter.adapter)] if adapter.adapter in UNMERGEABLE else []


def run(ctx: Context, params: MergeParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.adapters.saving import require_base
    from stages.lib.models.formats import formats_to_publish, say_if_other
    from stages.lib.models.generation import note_generation
    from stages.lib.models.loading import count_parameters, load_model
    from stages.lib.models.publishing import publish, zeros_of
    from stages.lib.processes.joining import use_threads
    from stages.lib.text.tokenizers import tokenizer_facts

    use_threads(ctx.resources)
    source = ctx.inputs["model"]
    if problems := unmergeable_adapter(ctx.inputs["adapter"]):
        raise ArtifactError(*problems)
    adapter = adapter_folder(ctx.inputs["adapter"])
    tokenizer = tokenizer_beside(ctx.inputs["adapter"], source)
    formats = formats_to_publish(ctx, "fp32", params.published_dtype)
    note_generation(ctx)
    if said := require_base(adapter, source, ctx.origin("model")[0]):
        ctx.journal.note(said)
    before = load_model(AutoModelForCausalLM, source)
    merged = with_adapter_merged(load_model(AutoModelForCausalLM, source), adapter)
    changed, change = difference_of(before, merged)
    if not changed:
        what = "changes no weight of the model: what it adds is zero"
        raise ArtifactError(Problem("inputs.adapter", what, "Name an adapter that was trained."))
    of = f"; tokenizer and chat template are the adapter's, from {tokenizer}" if tokenizer != source else ""
    ctx.journal.note(f"the adapter changes {changed} weights, by {change:.2%} of their norm{of}")
    published = publish(merged, merged.state_dict(), tokenizer, ctx.out, formats=formats, may_be_zero=zeros_of(source))
    say_if_other(ctx, formats, published)
    facts = Facts(
        **tokenizer_facts(ctx.out), head_type="causal_lm", dtype=published, parameters=count_parameters(merged)
    )
    return Result({"changed_weights": changed, "relative_change": change}, facts)


STAGE = Stage(
    kind="merge",
    version=2,
    summary="a causal model with the weights of an adapter added",
    params=MergeParams,
    inputs={"model": accepts(Kind.CAUSAL_LM), "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM)},
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("changed_weights", "relative_change"),
    estimate=estimate,
    check=check,
)


def with_adapter_merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with the adapter's weights added. Raises `ArtifactError` unless each of them is, and none is lacking."""
    from stages.lib.models.adapters.opening import attached
    from stages.lib.models.adapters.saving import own_method

    adapted: Any = attached(model, adapter)
    if own_method(adapter) is not None:
        return adapted
    merge = getattr(adapted, "merge_and_unload", None)
    if merge is None:
        kind = getattr(adapted.peft_config.get("default"), "peft_type", "this kind")
        what = f"is of the kind {kind}, which cannot be added to a model's weights"
        hint = f"Name an adapter with weights: {mergeable_methods()}."
        raise ArtifactError(Problem("inputs.adapter", what, hint))
    merged: PreTrainedModel = merge()  # in place; what becomes of the weights is looked at once they are written
    return merged


def difference_of(before: torch.nn.Module, after: torch.nn.Module) -> tuple[int, float]:
    """How many weights differ, and the norm of all differences as a fraction of the norm that these had before."""
    changed, moved, norm = 0, 0.0, 0.0
    old = before.state_dict()
    for name, tensor in after.state_dict().items():
        by = float((tensor - old[name]).double().norm() ** 2) if tensor.is_floating_point() else 0.0
        if by:
            changed, moved, norm = changed + 1, moved + by, norm + float(old[name].double().norm() ** 2)
    return changed, (moved / norm) ** 0.5 if norm else 0.0
