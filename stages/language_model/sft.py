"""`sft`: a causal model taught to answer in chats; the loss is on what the assistant says, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.lengths import length_problems, require_length
from stages.lib.text.chat_presets import text_if_file
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.text.chats import Chats


class SftParams(TrainingParams):
    """How the model is taught. One row is one chat."""

    max_length_tokens: int = Field(ge=8)
    """Tokens per chat. A longer one loses its oldest turns; one whose last exchange is too long is dropped and counted."""
    chat_template: Annotated[str, AfterValidator(text_if_file)] | None = None
    """How a chat becomes text: a preset (slipway, chatml), the path of a Jinja file, or a name among the several templates of the model's tokenizer. It takes the place of a template that the tokenizer has. A preset's special tokens must be in the vocabulary already. null: the tokenizer's own."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the chats than this cannot be used."""


def estimate(forecast: Forecast) -> Estimate:
    model, chats = forecast.inputs.get("model", Estimate()), forecast.inputs.get("chats", Estimate())
    return estimate_training(
        forecast,
        architecture=model.architecture,
        parameters=model.parameters,
        num_rows=chats.train_rows,
        sequence_length=forecast.params.max_length_tokens,
        vocabulary_size=model.vocabulary_size,
    )


def check(forecast: Forecast) -> list[Problem]:
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    return [*check_training(forecast), *length_problems(architecture, forecast.params.max_length_tokens)]


def run(ctx: Context, params: SftParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.formulas.token_losses import TokenObjective, measure_tokens, token_metrics
    from stages.lib.models.config import read_config
    from stages.lib.models.loading import load_model
    from stages.lib.text.batches import padding_of
    from stages.lib.text.chat_check import check_chat_template
    from stages.lib.text.chats import Chats, collate_chats, tokenizing_chats
    from stages.lib.text.tokenized_parts import tokenize_input
    from stages.lib.text.tokenizers import load_tokenizer, stop_token_ids, tokenizer_facts
    from stages.lib.training.loop import train

    source = ctx.inputs["model"]
    require_length(read_config(source), params.max_length_tokens)
    tokenizer = load_tokenizer(source)
    own_template = tokenizer.chat_template
    give_template(tokenizer, params.chat_template)
    if own_template and tokenizer.chat_template != own_template:
        ctx.journal.note("the chat template of the model's tokenizer is replaced by the one that chat_template names")
    check_chat_template(tokenizer, str(source))
    how = tokenizing_chats(tokenizer, params.max_length_tokens)
    train_rows, heldout_rows, ledger = tokenize_input(ctx, "chats", how, params.max_dropped_fraction)
    chats, heldout = Chats(train_rows), Chats(heldout_rows)
    require_ends(chats, stop_token_ids(tokenizer))
    # Any id does: padding is told by position.
    collate = collate_chats(padding_of(tokenizer))
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=source if tokenizer.chat_template == own_template else tokenizer,
        data=chats,
        collate=collate,
        objective=TokenObjective(),
        evaluate=lambda evaluator: token_metrics(evaluator.sums(heldout, collate, measure_tokens)),
    )
    metrics = {
        **trained.after,
        **{f"{name}_base": value for name, value in trained.before.items()},
        "train_loss": trained.train_loss,
        **ledger.metrics(),
    }
    facts = Facts(
        **tokenizer_facts(ctx.out if ctx.world.is_main else source),
        max_length_tokens=params.max_length_tokens,
        head_type="causal_lm",
        dtype=trained.dtype,
        parameters=trained.parameters,
        train_rows=len(chats),
        heldout_rows=len(heldout),
        train_tokens=chats.num_tokens,
        heldout_tokens=heldout.num_tokens,
        dropped_rows=dict(ledger.dropped),
        optimizer_steps=trained.steps,
    )
    return Result(metrics, facts)


STAGE = Stage(
    kind="sft",
    version=3,
    summary="Teaches a causal model to answer in chats of several turns; loss on the assistant's turns only.",
    params=SftParams,
    inputs={"model": accepts(Kind.CAUSAL_LM), "chats": accepts(Kind.CHATS)},
    output=Kind.CAUSAL_LM,
    run=run,
    headline=("heldout_loss", "heldout_loss_base", "heldout_token_accuracy"),
    distributed=True,
    estimate=estimate,
    check=check,
)


MIN_SHARE_OF_ENDS = 0.95
"""A model learns to stop from the chats whose last turn is asked for with its end."""


def give_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> None:
    """Sets the chat template: a preset, one of the tokenizer's own by its name, or a text; None for the one that it has.

    Raises `DataError` if that cannot be, or none is there.
    """
    from stages.lib.text.chat_presets import PRESETS
    from stages.lib.text.chat_rendering import special_tokens

    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    where = "params.chat_template"
    if wanted is None:
        if not own:
            what = "its tokenizer has no chat template"
            hint = (
                "Give the tokenizer stage one, or set chat_template here to a preset whose tokens the vocabulary has."
            )
            raise DataError(Problem("inputs.model", what, hint))
        if named and "default" not in named:
            what = f"the model's tokenizer has several chat templates and none called default: {', '.join(named)}"
            raise DataError(Problem(where, what, "Set it to one of these names, to a preset or to a file."))
    elif wanted in named:
        tokenizer.chat_template = named[wanted]
    elif wanted in PRESETS:
        preset = PRESETS[wanted]
        tokenizer.chat_template = preset.template
        present = {token.content for token in special_tokens(tokenizer)}
        if missing := [token for token in preset.special_tokens if token not in present]:
            what = f"'{wanted}' is written with {', '.join(missing)}, which the model's vocabulary does not have"
            hint = "Train the tokenizer with this preset: a model learns no tokens that it has no embeddings for."
            raise DataError(Problem(where, what, hint))
    elif "{{" in wanted or "{%" in wanted:
        tokenizer.chat_template = wanted
    else:
        what = f"no preset, no file and no template of the model's tokenizer has the name {wanted!r}"
        raise DataError(Problem(where, what, did_you_mean(wanted, [*PRESETS, *named])))


def require_ends(chats: Chats, stop_ids: list[int]) -> None:
    """Raises `DataError` if too few chats end with a token that stops generation."""
    share = chats.share_ending_with(stop_ids)
    if share < MIN_SHARE_OF_ENDS:
        raise DataError(
            Problem(
                "inputs.chats",
                f"only {share:.0%} of the chats end what the assistant says with a token that stops generation",
                "The model would not learn to stop: use a chat template that ends each turn with a special token.",
            )
        )
