"""`sft`: a causal model taught to answer in chats; the loss is on what the assistant says, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.models.architectures import grown_rows
from stages.lib.models.lengths import length_problems, require_length
from stages.lib.text.chat_presets import TemplateOfTokenizer, is_template, template_if_named
from stages.lib.text.template_date import TemplateDateParams, on_template_date
from stages.lib.text.template_forecast import (
    embedded_rows,
    no_default_problem,
    no_template_problem,
    template_problems_ahead,
    tokens_ahead,
)
from stages.lib.training.extension import EXTENSION_PARAMS
from stages.lib.training.forecast import check_training, estimate_training
from stages.lib.training.params import TrainingParams, causal_lm_or_adapter
from stages.lib.training.selection import TOKEN_METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.lib.models.embeddings import Grown
    from stages.lib.text.chats import Chats


class SftParams(TemplateDateParams, TrainingParams):
    """How the model is taught. One row is one chat."""

    max_length_tokens: int = Field(ge=8)
    """Tokens per chat. A longer one loses its oldest turns; one whose last exchange is too long is dropped and counted."""
    chat_template: Annotated[str | TemplateOfTokenizer, AfterValidator(template_if_named)] | None = None
    """How a chat becomes text: a preset (slipway, chatml), the path of a Jinja file, a name among the several templates of the model's tokenizer, or the path of another tokenizer's or model's folder, whose template is taken. It takes the place of a template that the tokenizer has. The tokens that it is written with must be in the vocabulary, or come into it by `add_tokens`. null: the tokenizer's own."""
    add_tokens: bool | list[Annotated[str, Field(min_length=2)]] = False
    """Tokens that the vocabulary gains, and the model embeddings for them, each the mean of the old ones. true: those that the template of a preset or another tokenizer is written with and the vocabulary lacks. A list: these. With either, a model that embeds fewer tokens than its tokenizer has gains the rest as well. false: none."""
    vocabulary_multiple: int | None = Field(default=None, ge=1)
    """Where embeddings are added, their number becomes a multiple of this. null: of the largest power of two, up to 64, that it was a multiple of."""
    thinking: Literal["trained", "masked", "stripped"] = "trained"
    """What becomes of the reasoning before an answer: learned like all that the assistant says; read, but nothing is learned from it; or taken out of every turn. What stands before a `</think>` that nothing opens is reasoning too. A chat with a mark of a thought anywhere else is then dropped."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the chats than this cannot be used."""

    def measures(self) -> tuple[str, ...]:
        return TOKEN_METRICS

    @property
    def trains_causal_lm(self) -> bool:
        return True

    @model_validator(mode="after")
    def what_is_added_is_learned(self) -> SftParams:
        if self.adapter is not None and self.add_tokens is not False:
            raise ValueError(
                "add_tokens needs embeddings that are trained, and under an adapter they are frozen: add the tokens in an sft "
                "step of its own without adapter (one step on all weights will do), and name that as the model here"
            )
        return self

    @model_validator(mode="after")
    def what_is_added_is_sound(self) -> SftParams:
        if self.vocabulary_multiple is not None and self.add_tokens is False:
            raise ValueError("vocabulary_multiple has no effect without add_tokens: remove it")
        if isinstance(self.add_tokens, list) and (
            twice := sorted({t for t in self.add_tokens if self.add_tokens.count(t) > 1})
        ):
            raise ValueError(f"add_tokens names {', '.join(twice)} more than once")
        return self


def estimate(forecast: Forecast) -> Estimate:
    model, chats = forecast.inputs.get("model", Estimate()), forecast.inputs.get("chats", Estimate())
    if forecast.params.add_tokens is not False:
        model = with_added_tokens(model, forecast.params)
    return estimate_training(
        forecast,
        architecture=model.architecture,
        parameters=model.parameters,
        num_rows=chats.train_rows,
        sequence_length=forecast.params.max_length_tokens,
        vocabulary_size=model.vocabulary_size,
    )


def check(forecast: Forecast) -> list[Problem]:
    model, params = forecast.inputs.get("model", Estimate()), forecast.params
    return [
        *check_training(forecast),
        *length_problems(model.architecture or {}, params.max_length_tokens),
        # The template beside an adapter that is continued is read when it is there.
        *(
            []
            if "adapter" in forecast.inputs
            else template_problems_ahead(model, params.chat_template, params.add_tokens)
        ),
    ]


@on_template_date
def run(ctx: Context, params: SftParams) -> Result:
    from transformers import AutoModelForCausalLM

    from stages.lib.formulas.token_losses import TokenObjective, measure_tokens, token_metrics
    from stages.lib.models.config import read_config
    from stages.lib.models.loading import load_model
    from stages.lib.text.batches import padding_of
    from stages.lib.text.chats import Chats, collate_chats, tokenizing_chats
    from stages.lib.text.tokenized_parts import tokenize_input
    from stages.lib.text.tokenizers import stop_token_ids, tokenizer_facts
    from stages.lib.training.loop import train

    source = ctx.inputs["model"]
    require_length(read_config(source), params.max_length_tokens)
    start = with_template(ctx, params)
    source, tokenizer = start.model, start.tokenizer
    how = tokenizing_chats(tokenizer, params.max_length_tokens, thinking=params.thinking)
    train_rows, heldout_rows, ledger = tokenize_input(ctx, "chats", how, params.max_dropped_fraction)
    chats, heldout = Chats(train_rows), Chats(heldout_rows)
    require_ends(chats, stop_token_ids(tokenizer))
    # Any id does: padding is told by position.
    collate = collate_chats(padding_of(tokenizer))
    trained = train(
        ctx,
        params,
        make_model=lambda: load_model(AutoModelForCausalLM, source),
        tokenizer=start.published,
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
        **start.metrics,
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
        added_tokens=start.added or None,
    )
    return Result(metrics, facts)


STAGE = Stage(
    kind="sft",
    version=4,
    summary="Teaches a causal model to answer in chats of several turns; loss on the assistant's turns only.",
    params=SftParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "chats": accepts(Kind.CHATS),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
        "extends": accepts(Kind.CAUSAL_LM, optional=True),
    },
    output=causal_lm_or_adapter,
    run=run,
    headline=("heldout_loss", "heldout_loss_base", "heldout_token_accuracy"),
    distributed=True,
    may_extend=EXTENSION_PARAMS,
    estimate=estimate,
    check=check,
)


MIN_SHARE_OF_ENDS = 0.95
"""A model learns to stop from the chats whose last turn is asked for with its end."""


class ChatStart(NamedTuple):
    """Where teaching a model chats begins."""

    model: Path
    """The folder with its weights: the input's, or one with embeddings for the tokens that were added."""
    tokenizer: PreTrainedTokenizerBase
    published: PreTrainedTokenizerBase | Path
    """The same tokenizer, as the folder that it lies in where it is unchanged there."""
    added: list[str]
    metrics: dict[str, float]


def with_template(ctx: Context, params: SftParams) -> ChatStart:
    """The input model with the chat template, and with embeddings for the tokens, that the params ask for.

    All processes call it. Raises `DataError` or `ArtifactError` if that cannot be, or the template is not fit for training.
    """
    from stages.lib.models.adapters.folders import tokenizer_to_train_with
    from stages.lib.models.embeddings import with_embeddings
    from stages.lib.text.chat_check import check_chat_template
    from stages.lib.text.tokenizers import load_tokenizer

    source, home = ctx.inputs["model"], tokenizer_to_train_with(ctx.inputs)
    tokenizer = load_tokenizer(home, embedded=params.add_tokens is False)
    own_template, old_ids = tokenizer.chat_template, set(tokenizer.get_vocab().values())
    added = give_template(tokenizer, params.chat_template, params.add_tokens)
    if own_template and tokenizer.chat_template != own_template:
        ctx.journal.note("the chat template of the model's tokenizer is replaced by the one that chat_template names")
    check_chat_template(tokenizer, str(home))
    if params.add_tokens is not False:
        grown = with_embeddings(ctx, source, tokenizer, old_ids, params.vocabulary_multiple)
        ctx.journal.note(what_was_added(added, grown))
        if grown:
            counts = {"added_tokens": float(len(added)), "added_embeddings": float(grown.rows - grown.rows_before)}
            return ChatStart(grown.folder, tokenizer, grown.folder, added, counts)
    return ChatStart(source, tokenizer, home if tokenizer.chat_template == own_template else tokenizer, added, {})


def with_added_tokens(model: Estimate, params: SftParams) -> Estimate:
    """What is known of the model once it embeds the tokens that its vocabulary gains."""
    size, rows = tokens_ahead(model, params.chat_template, params.add_tokens), embedded_rows(model)
    if size is None or rows is None:
        return replace(model, parameters=None, architecture=None, vocabulary_size=None)
    architecture = {**(model.architecture or {}), "vocab_size": grown_rows(rows, size, params.vocabulary_multiple)}
    return replace(model, parameters=None, architecture=architecture, vocabulary_size=size)


def give_template(
    tokenizer: PreTrainedTokenizerBase,
    wanted: str | TemplateOfTokenizer | None,
    add_tokens: bool | Sequence[str] = False,
) -> list[str]:
    """Sets the chat template: a preset, one of the tokenizer's own by its name, another tokenizer's, or a text; None for the
    one that it has. Adds the tokens that it lacks, or that are listed, if `add_tokens` says so; returns what is new.

    Raises `DataError` if that cannot be, or none is there.
    """
    from stages.lib.text.added_tokens import (
        GIVE_ONE,
        add_to_vocabulary,
        chosen_tokens,
        lacking,
        needed_tokens,
    )
    from stages.lib.text.chat_presets import PRESETS, TokenToAdd
    from stages.lib.text.turn_marks import what_is_written

    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    needed: list[TokenToAdd] = []
    asked_of = wanted
    if wanted is None:
        if not own:
            raise DataError(Problem("inputs.model", "its tokenizer has no chat template", GIVE_ONE))
        if named and "default" not in named:
            raise DataError(no_default_problem(named))
    elif isinstance(wanted, TemplateOfTokenizer):
        tokenizer.chat_template = wanted.template
        needed = needed_tokens(wanted, what_is_written(tokenizer))
    elif wanted in named:
        tokenizer.chat_template, asked_of = named[wanted], None
    elif wanted in PRESETS:
        tokenizer.chat_template = PRESETS[wanted].template
        needed = needed_tokens(wanted)
    elif is_template(wanted):
        tokenizer.chat_template = wanted
    else:
        raise DataError(no_template_problem(wanted, named))
    known = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return add_to_vocabulary(tokenizer, chosen_tokens(asked_of, lacking(tokenizer, needed), add_tokens, known))


def what_was_added(added: Sequence[str], grown: Grown | None) -> str:
    """What became of the param add_tokens, as a line of the journal."""
    if grown is None:
        return "add_tokens adds none: the vocabulary has what the chat template needs, and the model embeds all of it"
    rows = f"{grown.rows:,}, instead of {grown.rows_before:,}" if grown.rows != grown.rows_before else f"{grown.rows:,}"
    new = f"{len(added)} tokens ({', '.join(added[:8])}{', ...' if len(added) > 8 else ''})" if added else "no tokens"
    return f"the vocabulary gains {new}; the model embeds {rows}; what is new begins as the mean of the old embeddings"


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
