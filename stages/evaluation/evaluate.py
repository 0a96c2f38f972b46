"""The stage `evaluate`: any number of models side by side on the same held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.errors import Problem, did_you_mean
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Kind
from pipeline.store.durable import write_text
from pipeline.store.numbers import json_text, require_finite
from stages.lib.formulas.bounds import Nucleus, TemperatureOrGreedy, Weight
from stages.lib.measuring.adapter_inputs import adapter_input_problems
from stages.lib.text.chat_fitting import split_last_answer
from stages.lib.text.template_date import TemplateDateParams, on_template_date
from stages.lib.text.template_forecast import unembedded_problems, untemplated_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.lib.measuring.compared_models import Rows, Subject
    from stages.lib.measuring.scored_replies import ScoredReplies


BAD_WEIGHTS = "Look at this model's weights."


class GenerationParams(Strict):
    heldout_prompts: int = Field(default=4, ge=0)
    """Held-out chats of which each model writes the last assistant turn: the first so many that fit all models."""
    prompts: list[str] = []
    """User messages to which each model replies as well."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest reply, in tokens. One that is cut off there is marked as truncated."""
    temperature: TemperatureOrGreedy = 0.0
    """0 always takes the likeliest token; above, from 0.001 to 100, tokens are drawn with the seed of the step, the higher the freer."""
    top_p: Nucleus = 1.0
    """Tokens are drawn from the smallest set that holds this much of the probability."""


class ScoredRepliesParams(Strict):
    heldout_prompts: int = Field(default=64, ge=1)
    """Held-out chats of which each model writes the last assistant turn: the first so many, without those that a model or a reward model cannot read whole."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest reply, in tokens. One that is cut off there is scored as it is, and counted as truncated."""
    temperature: TemperatureOrGreedy = 1.0
    """1 draws replies as the model finds them probable, with the seed of the step, so that their mean reward estimates what it earns; lower is less free, and 0 always takes the likeliest token."""
    top_p: Nucleus = 1.0
    """Tokens are drawn from the smallest set that holds this much of the probability."""
    win_rate_against: str | None = None
    """The model against whose replies those of the others win or lose, by its name in inputs.models or inputs.adapters. null: against the replies that were held out."""


class EvaluateParams(TemplateDateParams):
    heldout_blocks: int | None = Field(default=None, ge=1)
    """Blocks of held-out tokens on which perplexity is measured: the first so many. null: all."""
    heldout_chats: int | None = Field(default=None, ge=1)
    """Held-out chats on which the loss of assistant tokens is measured: the first so many. null: all."""
    heldout_pairs: int | None = Field(default=None, ge=1)
    """Held-out preference pairs on which accuracy is measured: the first so many. null: all."""
    generation: GenerationParams | None = None
    """Replies that every model writes to the same prompts, for reading. null: none."""
    uncertainty_penalty: Weight = Field(default=0.0, exclude_if=lambda penalty: not penalty)
    """How many standard deviations over the heads of an ensemble are taken off their mean, in all that reward models score. Only where all of them have several heads."""
    scored_replies: ScoredRepliesParams | None = None
    """Replies that every model writes to the same held-out prompts, and every reward model scores: metrics such as heldout_reward.<model>, or with several reward models heldout_reward.<reward model>.<model>. null: none."""


USED_ON = {
    "heldout_blocks": "tokens",
    "heldout_chats": "chats",
    "heldout_pairs": "preferences",
    "uncertainty_penalty": "reward_models",
}
"""Param -> the input without which it has no effect."""


def check(forecast: Forecast) -> list[Problem]:
    """Inputs that nothing is measured on, and options that nothing would use."""
    params: EvaluateParams = forecast.params
    roles = {role.split(".")[0] for role in forecast.inputs}
    generation = params.generation
    problems = [
        Problem(f"params.{option}", f"has no effect without the input {role}", f"Add it to inputs, or remove {option}.")
        for option, role in USED_ON.items()
        if getattr(params, option) not in (None, 0.0) and role not in roles
    ]
    if "reward_models" in roles and "preferences" not in roles and params.scored_replies is None:
        hint = "Add preferences to inputs, or scored_replies to params."
        problems.append(Problem("inputs.reward_models", "are judged by preferences, or score replies", hint))
    if generation is not None and generation.heldout_prompts and "chats" not in roles:
        where = "params.generation.heldout_prompts"
        problems.append(Problem(where, "are taken from the input chats", "Add it to inputs, or write 0 here."))
    if generation is not None and not generation.heldout_prompts and not generation.prompts:
        problems.append(Problem("params.generation", "has no prompts", "Give heldout_prompts or prompts."))
    if params.scored_replies is not None:
        problems += check_scored_replies(params.scored_replies, forecast, roles)
    if not roles & {"tokens", "chats", "preferences"} and generation is None:
        problems.append(Problem("inputs", "there is nothing to measure on", "Add tokens, chats or preferences."))
    reading = [role for role in forecast.inputs if role.startswith("reward_models.")]
    if roles & {"chats", "preferences"} or generation is not None:
        reading += [role for role in forecast.inputs if role.startswith("models.")]
    problems += adapter_input_problems(forecast)
    return [*problems, *unembedded_problems(forecast), *untemplated_problems(forecast, reading)]


@on_template_date
def run(ctx: Context, params: EvaluateParams) -> Result:
    from stages.lib.measuring.compared_models import Rows, add_chats, add_pairs, add_text
    from stages.lib.measuring.measures import side_by_side
    from stages.lib.measuring.scored_replies import ScoredReplies, metrics_of
    from stages.lib.measuring.subjects import open_judges, open_subjects
    from stages.lib.processes.joining import use_threads

    use_threads(ctx.resources)
    subjects = open_subjects(ctx)
    judges = open_judges(ctx, params.uncertainty_penalty)
    rows = Rows()
    if "tokens" in ctx.inputs:
        add_text(rows, ctx.inputs["tokens"], params.heldout_blocks, subjects)
    if "chats" in ctx.inputs:
        add_chats(rows, ctx.inputs["chats"], params.heldout_chats, subjects)
    if "preferences" in ctx.inputs:
        add_pairs(rows, ctx.inputs["preferences"], params.heldout_pairs, [*subjects, *judges])
    prompts = choose_prompts(params.generation, rows)
    scored = None
    if params.scored_replies is not None:
        num_prompts, room = params.scored_replies.heldout_prompts, params.scored_replies.max_new_tokens
        scored = ScoredReplies.choose(ctx.inputs["chats"], num_prompts, room, subjects, judges)
    total = len(subjects) + len(judges)
    for done, subject in enumerate(subjects):
        ctx.journal.write("progress", what=f"evaluate {subject.name}", done=done, total=total)
        make = partial(measure, ctx, params, subject, rows, prompts, scored)
        subject.results = made_once(ctx, f"measured-model-{subject.name}.json", make)
    if scored is not None:
        scored.add({each.name: each.results["scored_replies"] for each in subjects}, judges)
    for done, each in enumerate(judges, start=len(subjects)):
        ctx.journal.write("progress", what=f"evaluate {each.name}", done=done, total=total)
        each.results = made_once(ctx, f"measured-reward-{each.name}.json", partial(judge, ctx, each, scored))
    metrics = side_by_side([*subjects, *judges])
    summary = summarize(params.scored_replies, scored, judges)
    metrics |= metrics_of(summary) if summary else {}
    metrics |= rows.baselines
    require_finite(metrics, "models", BAD_WEIGHTS)
    write_report(ctx, subjects, judges, rows, prompts, scored, summary)
    return Result(metrics)


STAGE = Stage(
    kind="evaluate",
    version=6,
    summary="models side by side: perplexity, loss on chats, preference accuracy, sample replies, rewards of replies",
    params=EvaluateParams,
    inputs={
        "models": accepts(Kind.CAUSAL_LM, Kind.QUANTIZED_LM, optional=True, many=True),
        "adapters": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True, many=True),
        "base": accepts(Kind.CAUSAL_LM, optional=True),
        "reward_models": accepts(Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL, optional=True, many=True),
        "tokens": accepts(Kind.TOKENS, optional=True),
        "chats": accepts(Kind.CHATS, optional=True),
        "preferences": accepts(Kind.PREFERENCES, optional=True),
    },
    output=Kind.REPORT,
    run=run,
    headline=("heldout_perplexity.", "heldout_reward.", "heldout_reward_reference."),
    check=check,
)


def check_scored_replies(params: ScoredRepliesParams, forecast: Forecast, roles: set[str]) -> list[Problem]:
    """Inputs that the block needs, and a model that it names."""
    where = "params.scored_replies"
    problems = [
        Problem(where, f"{what} the input {role}", f"Add {role} to inputs, or remove scored_replies.")
        for role, what in (("chats", "answer prompts of"), ("reward_models", "are scored by"))
        if role not in roles
    ]
    models = [role.partition(".")[2] for role in forecast.inputs if role.startswith(("models.", "adapters."))]
    named = params.win_rate_against
    if named is not None and named not in models:
        what = f"'{named}' is none of inputs.models and inputs.adapters"
        problems.append(Problem(f"{where}.win_rate_against", what, did_you_mean(named, models)))
    return problems


def choose_prompts(params: GenerationParams | None, rows: Rows) -> list[dict[str, Any]]:
    """`prompt` and, where it comes from a held-out chat, the `reference`: the assistant turn that was held out."""
    if params is None:
        return []
    last_turns = [split_last_answer(messages) for messages in rows.chats[: params.heldout_prompts]]
    prompts: list[dict[str, Any]] = [{"prompt": prompt, "reference": reference} for prompt, reference in last_turns]
    return prompts + [{"prompt": [{"role": "user", "content": each}], "reference": None} for each in params.prompts]


def made_once(ctx: Context, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, kept in the work folder under `name`: after a restart it is read from there."""
    path = ctx.work / name
    if not path.exists():
        write_text(path, json_text(make(), name.removesuffix(".json"), hint=BAD_WEIGHTS))
    made: dict[str, Any] = json.loads(path.read_bytes())
    return made


def measure(
    ctx: Context,
    params: EvaluateParams,
    subject: Subject,
    rows: Rows,
    prompts: Sequence[Mapping[str, Any]],
    scored: ScoredReplies | None,
) -> dict[str, Any]:
    """The measures of one language model, and its replies."""
    from stages.lib.measuring.measures import language_model_measures, num_weights
    from stages.lib.processes.joining import device_type

    batch_size = ctx.resources.micro_batch_size or 8
    model = subject.load(device_type(ctx.resources))
    measures = language_model_measures(model, subject, rows, batch_size)
    replies = [reply_to(ctx, params, model, subject.tokenizer, index, each) for index, each in enumerate(prompts)]
    if replies:
        measures["truncated_replies"] = sum(each["truncated"] for each in replies) / len(replies)
    facts = {"parameters": num_weights(model), "vocabulary": len(subject.tokenizer)}
    results = {"measures": measures, "facts": facts, "replies": replies}
    if scored is not None:
        results["scored_replies"] = replies_to_score(ctx, params, model, subject.tokenizer, scored)
    return results


def reply_to(
    ctx: Context,
    params: EvaluateParams,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: Mapping[str, Any],
) -> dict[str, Any]:
    """The model's reply to prompt number `index`. All models draw with the same random numbers."""
    from stages.lib.generating.replies import write_reply
    from stages.lib.measuring.scored_replies import reply_record

    assert params.generation is not None
    reply = write_reply(
        model,
        tokenizer,
        prompt["prompt"],
        position=index,
        max_new_tokens=params.generation.max_new_tokens,
        temperature=params.generation.temperature,
        top_p=params.generation.top_p,
        seed=ctx.seed,
    )
    return reply_record(reply)


def replies_to_score(
    ctx: Context,
    params: EvaluateParams,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scored: ScoredReplies,
) -> list[dict[str, Any]]:
    """The model's reply to each of the prompts. All models draw with the same random numbers."""
    from stages.lib.generating.replies import write_replies
    from stages.lib.measuring.scored_replies import reply_record

    assert params.scored_replies is not None
    replies = write_replies(
        model,
        tokenizer,
        [each.prompt for each in scored.prompts],
        positions=[each.row for each in scored.prompts],
        max_new_tokens=params.scored_replies.max_new_tokens,
        temperature=params.scored_replies.temperature,
        top_p=params.scored_replies.top_p,
        seed=ctx.seed,
        batch_size=ctx.resources.micro_batch_size or 8,
    )
    return [reply_record(reply) for reply in replies]


def judge(ctx: Context, subject: Subject, scored: ScoredReplies | None) -> dict[str, Any]:
    """The measures of one reward model, and its scores of all replies."""
    from stages.lib.measuring.measures import num_weights, reward_model_measures
    from stages.lib.preferring.reward_models import load_reward_model
    from stages.lib.processes.joining import device_type

    model, tokenizer = load_reward_model(subject.folder, device_type(ctx.resources))
    batch_size = ctx.resources.micro_batch_size or 8
    measures = reward_model_measures(model, subject, batch_size, tokenizer.pad_token_id)
    facts = {"parameters": num_weights(model), "vocabulary": len(tokenizer)}
    scores = scored.score(model, subject, batch_size) if scored is not None else None
    return {"measures": measures, "facts": facts, "scores": scores}


def summarize(
    params: ScoredRepliesParams | None, scored: ScoredReplies | None, judges: Sequence[Subject]
) -> dict[str, Any] | None:
    """How the replies were written, and what was measured of them; None where nobody asked for them."""
    if params is None or scored is None:
        return None
    scores = {each.name: each.results["scores"] for each in judges}
    return {**params.model_dump(), **scored.summary(scores, params.win_rate_against)}


def write_report(
    ctx: Context,
    subjects: Sequence[Subject],
    judges: Sequence[Subject],
    rows: Rows,
    prompts: Sequence[Mapping[str, Any]],
    scored: ScoredReplies | None,
    summary: Mapping[str, Any] | None,
) -> None:
    """`report.json` with all numbers, `report.md` for reading, `generations.jsonl` with one line per prompt.

    Where replies were scored, `scored_replies.jsonl` has one line per prompt of these.
    """
    from stages.lib.measuring.compared_models import comparison_notes
    from stages.lib.measuring.report import report_markdown
    from stages.lib.rows.canonical import write_rows

    report: dict[str, Any] = {
        "models": {each.name: each.describe() for each in subjects},
        "reward_models": {each.name: each.describe() for each in judges},
        "rows": rows.describe(),
        "baselines": rows.baselines,
        "notes": comparison_notes(subjects, rows),
    }
    generations = [
        {**prompt, "replies": {subject.name: subject.results["replies"][index] for subject in subjects}}
        for index, prompt in enumerate(prompts)
    ]
    replies: list[dict[str, Any]] = []
    if scored is not None:
        report["rows"]["scored_replies"] = {"used": len(scored.prompts), "left_out": dict(scored.left_out)}
        report["scored_replies"] = summary
        replies = scored.rows({each.name: each.results["scores"] for each in judges})
        write_rows(ctx.out / "scored_replies.jsonl", replies)
    text = json_text(report, "report.json", indent=2)
    (ctx.out / "report.json").write_text(text + "\n", encoding="utf-8")
    (ctx.out / "report.md").write_text(report_markdown(report, generations, replies), encoding="utf-8")
    write_rows(ctx.out / "generations.jsonl", generations)
