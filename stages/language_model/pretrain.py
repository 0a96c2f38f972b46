"""`pretrain`: a language model from packed tokens, from scratch or continued, by the causal or the masked objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import ArtifactError, Problem, RecipeError
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.adapters.params import VirtualTokens
from stages.lib.models.architectures import (
    planned_architecture,
    starting_model,
    starting_problems,
    vocabulary_problems,
)
from stages.lib.models.families import mixing_problems
from stages.lib.text.template_forecast import unembedded_problems
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams
from stages.lib.training.selection import TOKEN_METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.text.batches import Collate
    from stages.lib.training.evaluating import Evaluator, Metrics


class PretrainParams(TrainingParams):
    """How the model is built and trained. One row is one block of `sequence_length` tokens of the pack stage."""

    global_batch_size: int | None = Field(default=None, ge=1)  # type: ignore[assignment]
    """Blocks per optimizer step, over all processes. Give either this or `global_batch_tokens`."""
    global_batch_tokens: int | None = Field(default=None, ge=1)
    """The same in tokens: a multiple of the blocks' length."""
    objective: Literal["causal", "masked"] = "causal"
    """causal: predict the next token; makes a causal_lm. masked: predict hidden tokens; makes an encoder."""
    architecture: dict[str, Any] | None = None
    """The model to begin with: `model_type` (llama, qwen3, gpt2, bert, ...) and fields of its transformers config. Needed
    unless there is an input `model`. The vocabulary's size and special tokens are the tokenizer's."""
    vocabulary_multiple: int = Field(default=1, ge=1)
    """The number of embeddings is rounded up to a multiple of this; the ids beyond the vocabulary are never used."""
    masking_probability: float | None = Field(default=None, ge=1e-3, lt=1)
    """Share of tokens that the masked objective asks for: 80% of them become the mask token, 10% a random one, 10% stay.
    None: 0.15 with the masked objective."""
    isolate_documents: bool = True
    """Whether each document in a block is a world of its own: attention and positions begin anew at its start, and the
    last token of one is not asked to predict the first of the next."""

    def measures(self) -> tuple[str, ...]:
        return TOKEN_METRICS

    @property
    def trains_causal_lm(self) -> bool:
        return self.objective == "causal"

    @model_validator(mode="after")
    def blocks_are_whole(self) -> PretrainParams:
        if isinstance(self.adapter, VirtualTokens) and self.isolate_documents:
            raise ValueError(
                f"adapter: {self.adapter.method} puts its tokens before a whole block, not before each document in it: set "
                "isolate_documents: false, or take a method without virtual tokens"
            )
        return self

    @model_validator(mode="after")
    def one_batch_size(self) -> PretrainParams:
        if (self.global_batch_size is None) == (self.global_batch_tokens is None):
            raise ValueError("give either global_batch_size or global_batch_tokens, and not both")
        if self.objective == "causal" and self.masking_probability is not None:
            raise ValueError("masking_probability has no effect on the causal objective: remove it")
        return self


def output_kind(params: PretrainParams, inputs: Mapping[str, Kind]) -> Kind:
    made = Kind.CAUSAL_LM if params.objective == "causal" else Kind.ENCODER
    if inputs.get("model", made) is not made:
        raise RecipeError(
            Problem(
                "params.objective",
                f"is {params.objective}, and the input model is of the kind {inputs['model']}",
                "Change one.",
            )
        )
    return Kind.ADAPTER if params.publishes_adapter else made


def estimate(forecast: Forecast) -> Estimate:
    params: PretrainParams = forecast.params
    tokens, model = forecast.inputs.get("tokens", Estimate()), forecast.inputs.get("model", Estimate())
    length = tokens.sequence_length
    architecture = model.architecture
    if params.architecture is not None:
        known, block = tokens.vocabulary_size, params.architecture
        architecture = planned_architecture(block, known, params.vocabulary_multiple) if known else block
    blocks = tokens.train_tokens // length if tokens.train_tokens and length else None
    size_known = params.global_batch_size is not None or length is not None
    return estimate_training(
        forecast,
        architecture=architecture,
        parameters=model.parameters,
        num_rows=blocks,
        sequence_length=length,
        global_batch_size=blocks_per_step(params, length or 1) if size_known else None,
        vocabulary_size=tokens.vocabulary_size,
        train_tokens=tokens.train_tokens,
    )


def check(forecast: Forecast) -> list[Problem]:
    params: PretrainParams = forecast.params
    tokens = forecast.inputs.get("tokens", Estimate())
    problems: list[Problem] = []
    if params.global_batch_size is not None or tokens.sequence_length is not None:
        try:
            problems += check_training(forecast, blocks_per_step(params, tokens.sequence_length or 1))
        except RecipeError as error:
            problems += [problem for problem in error.problems if isinstance(problem, Problem)]
    architecture = params.architecture or forecast.inputs.get("model", Estimate()).architecture or {}
    problems += mixing_problems(architecture, params.isolate_documents)
    problems += starting_problems(
        params.architecture,
        "model",
        forecast,
        causal=params.objective == "causal",
        vocabulary_multiple=params.vocabulary_multiple,
    )
    problems += unembedded_problems(forecast)
    return problems + vocabulary_problems(forecast, "model", "tokens", "Pack with the tokenizer of the model.")


def run(ctx: Context, params: PretrainParams) -> Result:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from stages.lib.formulas.token_losses import TokenObjective, measure_tokens, token_metrics
    from stages.lib.models.asking import require_attention
    from stages.lib.models.isolation import plain_ids, require_isolation
    from stages.lib.models.loading import load_model
    from stages.lib.text.blocks import Blocks
    from stages.lib.text.packed import PackedTokens, facts_of_tokens
    from stages.lib.text.tokenizers import load_tokenizer, tokenizer_facts, tokenizer_folder
    from stages.lib.training.loop import train

    folder = ctx.inputs["tokens"]
    packed, heldout = PackedTokens(folder), PackedTokens(folder, "heldout")
    length = packed.sequence_length
    size = blocks_per_step(params, length)
    params = params.model_copy(update={"global_batch_size": size, "global_batch_tokens": None})
    tokenizer = load_tokenizer(folder)
    causal = params.objective == "causal"
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    new = {"causal": causal, "vocabulary_multiple": params.vocabulary_multiple}
    source, config = starting_model(ctx, "model", params.architecture, auto_class, length, **new)
    if kernel := attention_of(params).get("attn_implementation"):
        require_attention(auto_class, source, kernel, "params.isolate_documents", "Set isolate_documents: false.")
    collate, heldout_collate = collates(ctx, params, tokenizer, config, length)

    def evaluate(evaluator: Evaluator) -> Metrics:
        if params.isolate_documents:
            require_isolation(evaluator, heldout_collate, plain_ids(tokenizer), length)
        return token_metrics(evaluator.sums(Blocks(heldout), heldout_collate, measure_tokens))

    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(auto_class, source, **attention_of(params)),
        tokenizer=tokenizer_folder(folder),
        data=Blocks(packed),
        collate=collate,
        objective=TokenObjective(),
        evaluate=evaluate,
    )
    start = "base" if "model" in ctx.inputs else "untrained"
    metrics = {
        **trained.after,
        **{f"{name}_{start}": value for name, value in trained.before.items()},
        "train_loss": trained.train_loss,
        "trained_tokens": float(trained.steps * size * length),
    }
    facts = Facts(
        **tokenizer_facts(ctx.out if ctx.world.is_main else folder),
        **facts_of_tokens(packed, heldout),
        head_type="causal_lm" if causal else "masked_lm",
        dtype=trained.dtype,
        attention_kernel=attention_of(params).get("attn_implementation"),
        parameters=trained.parameters,
        optimizer_steps=trained.steps,
    )
    return Result(metrics, facts)


STAGE = Stage(
    kind="pretrain",
    version=2,
    summary="Trains a language model on packed tokens, from scratch or continued, causal or masked.",
    params=PretrainParams,
    inputs={
        "tokens": accepts(Kind.TOKENS),
        "model": accepts(Kind.CAUSAL_LM, Kind.ENCODER, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "extends": accepts(Kind.CAUSAL_LM, Kind.ENCODER, optional=True),
    },
    output=output_kind,
    run=run,
    headline=(
        "heldout_perplexity",
        "heldout_perplexity_untrained",
        "heldout_perplexity_base",
    ),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)

MASKING_PROBABILITY = 0.15
HELDOUT_SEED = 0


def blocks_per_step(params: PretrainParams, length: int) -> int:
    """The global batch in blocks. Raises `RecipeError` if it is given in tokens and does not divide."""
    if params.global_batch_size is not None:
        return params.global_batch_size
    assert params.global_batch_tokens is not None
    if params.global_batch_tokens % length:
        below = params.global_batch_tokens - params.global_batch_tokens % length
        sizes = " or ".join(f"{size}" for size in (below, below + length) if size)
        raise RecipeError(
            Problem(
                "params.global_batch_tokens",
                f"{params.global_batch_tokens} is not a multiple of the blocks' length of {length} tokens",
                f"Take {sizes}.",
            )
        )
    return params.global_batch_tokens // length


def attention_of(params: PretrainParams) -> dict[str, str]:
    """Options of loading: a mask over pairs of tokens is read as such by one attention only, causal borders by all."""
    masks_of_pairs = params.objective == "masked" and params.isolate_documents
    return {"attn_implementation": "sdpa"} if masks_of_pairs else {}


def collates(
    ctx: Context, params: PretrainParams, tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any], length: int
) -> tuple[Collate, Collate]:
    """How blocks become tensors in training, and how held-out ones do."""
    from stages.lib.formulas.masking import Masking
    from stages.lib.models.lengths import first_position
    from stages.lib.text.blocks import collate_causal, collate_masked
    from stages.lib.text.chat_rendering import special_ids

    if params.objective == "causal":
        collate = collate_causal(isolate=params.isolate_documents)
        return collate, collate
    masking = Masking(
        probability=params.masking_probability or MASKING_PROBABILITY,
        mask_token_id=require_mask_token(tokenizer),
        vocabulary_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
    )
    shift = None
    if params.isolate_documents:
        require_whole_view(config, length)
        shift = first_position(config)
    # The same masks for every model and at every step, so that held-out numbers compare.
    seeds = ctx.seed, HELDOUT_SEED
    train, heldout = (collate_masked(masking, seed, first_position=shift) for seed in seeds)
    return train, heldout


def require_whole_view(config: Mapping[str, Any], length: int) -> None:
    """Raises `RecipeError` if layers of the model see only a window of a block: the mask that keeps documents apart
    would take the place of the window's."""
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    window = config.get("local_attention") or config.get("sliding_window")
    # A window of w reaches w / 2 to each side.
    if windowed and window is not None and length - 1 > window // 2:
        raise RecipeError(
            Problem(
                "params.isolate_documents",
                f"is true, and some layers of {config['model_type']} see {window} tokens of the blocks' {length} only",
                "Set isolate_documents: false, or architecture.local_attention to at least twice the blocks' length.",
            )
        )


def require_mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise ArtifactError(
            Problem(
                "inputs.tokens",
                "its tokenizer has no mask token",
                "Add one in the tokenizer stage, or take the causal objective.",
            )
        )
    return int(tokenizer.mask_token_id)
