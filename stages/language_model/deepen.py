"""`deepen`: a causal model with more layers, which add nothing until they are trained, so that it says what it said."""

from __future__ import annotations

from pydantic import Field

from pipeline.errors import Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.adapters.params import ADDED_LAYERS
from stages.lib.models.arithmetic import field_of, parameter_count
from stages.lib.models.generation import generation_notes
from stages.lib.models.published import PublishedDtype, PublishedParams


class DeepenParams(PublishedParams):
    """How many layers are added, and how the model is published."""

    num_new_layers: int = Field(ge=1)
    """How many layers are added, each after a group of as many layers as the others. They must divide the model's."""
    published_dtype: PublishedDtype | None = None
    """Number format of the weights that are published. null: the one that the model has."""


def estimate(forecast: Forecast) -> Estimate:
    model = forecast.inputs.get("model", Estimate())
    deeper = deeper_architecture(forecast)
    return Estimate(
        parameters=parameter_count(deeper) if deeper else None,
        architecture=deeper,
        vocabulary_size=model.vocabulary_size,
        sequence_length=model.sequence_length,
        notes=tuple(generation_notes(model.folder)) or None,
    )


def check(forecast: Forecast) -> list[Problem]:
    """Whether the model's layers fall into so many groups, where they are known."""
    architecture = forecast.inputs.get("model", Estimate()).architecture
    layers = field_of(architecture, "num_hidden_layers") if architecture else None
    new = forecast.params.num_new_layers
    if not layers or layers % new == 0:
        return []
    fitting = ", ".join(str(number) for number in range(1, layers + 1) if layers % number == 0)
    what = f"is {new}, and the model's {layers} layers do not fall into so many groups of one size"
    return [Problem("params.num_new_layers", what, f"Take one of {fitting}.")]


def run(ctx: Context, params: DeepenParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.models.adapters.methods import layers_of
    from stages.lib.models.deepening import deepened
    from stages.lib.models.formats import formats_to_publish, say_if_other
    from stages.lib.models.generation import note_generation
    from stages.lib.models.loading import count_parameters, load_model
    from stages.lib.models.publishing import publish, zeros_of
    from stages.lib.processes.joining import use_threads
    from stages.lib.text.tokenizers import tokenizer_facts

    use_threads(ctx.resources)
    source = ctx.inputs["model"]
    formats = formats_to_publish(ctx, "fp32", params.published_dtype)
    note_generation(ctx)
    model = load_model(AutoModelForCausalLM, source)
    before = count_parameters(model)
    deeper = deepened(model, params.num_new_layers)
    layers = getattr(deeper.config, ADDED_LAYERS)
    ctx.journal.note(f"new are the layers {', '.join(map(str, layers))}; the model says what it said, bit for bit")
    known, names = zeros_of(source), layers_of(deeper)
    new = tuple(f"{names[layer]}." for layer in layers)
    published = publish(
        deeper,
        deeper.state_dict(),
        source,
        ctx.out,
        formats=formats,
        may_be_zero=lambda name: name.startswith(new) or known(name),
    )
    say_if_other(ctx, formats, published)
    after = count_parameters(deeper)
    facts = Facts(**tokenizer_facts(ctx.out), head_type="causal_lm", dtype=published, parameters=after)
    return Result({"new_layers": params.num_new_layers, "new_parameters": after - before}, facts)


STAGE = Stage(
    kind="deepen",
    version=1,
    summary="a causal model with more layers, which add nothing until they are trained",
    params=DeepenParams,
    inputs={"model": accepts(Kind.CAUSAL_LM)},
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("new_layers", "new_parameters"),
    estimate=estimate,
    check=check,
)


def deeper_architecture(forecast: Forecast) -> dict[str, object] | None:
    """The architecture of what is made, as far as that of the model is known."""
    architecture = forecast.inputs.get("model", Estimate()).architecture
    layers = field_of(architecture, "num_hidden_layers") if architecture else None
    new = forecast.params.num_new_layers
    if architecture is None or not layers or layers % new:
        return None
    group = layers // new
    added = [number * (group + 1) + group for number in range(new)]
    per_layer = [key for key, value in architecture.items() if isinstance(value, list) and len(value) == layers]
    name = next((each for each in ("n_layer", "n_layers") if each in architecture), "num_hidden_layers")
    left = {key: value for key, value in architecture.items() if key not in per_layer}
    return {**left, name: layers + new, ADDED_LAYERS: added}
