"""`sample_preferences`: a policy answers prompts several times, and its best and worst answers become preferences.

So what a policy says now is a data set like any other: `dpo` and its like read the pairs (West-of-N, Pace et al., 2024;
iterated DPO, Xu et al., 2023), `sft` the best answers alone (rejection sampling: Stiennon et al., 2020, best of n; Touvron et
al., 2023). Answers are ranked by a reward model, by rewards in code, or by their weighted sum. Each side of the prompts stays
what it is, training or held-out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from stages.lib.formulas.bounds import Nucleus, Temperature, Weight
from stages.lib.models.adapters.folders import tokenizer_to_train_with, unreadable_adapter, virtual_tokens_in
from stages.lib.models.lengths import length_problems, require_length
from stages.lib.models.memory import BYTES
from stages.lib.models.noise import noise_problems
from stages.lib.on_policy.forecast import reward_model_problems
from stages.lib.on_policy.reward_params import Rewards, learned
from stages.lib.rows.canonical import write_rows
from stages.lib.text.template_date import TemplateDateParams, on_template_date
from stages.lib.text.template_forecast import untaught_problems, untemplated_problems

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.lib.on_policy.candidates import CandidateWriter, DrawnCandidates
    from stages.lib.on_policy.sampled_rows import SampledRows
    from stages.lib.rows.ledger import Ledger
    from stages.lib.text.prompts import PromptRow, Prompts


class SamplePreferencesParams(TemplateDateParams):
    """What is drawn, how it is ranked, and what is kept."""

    write: Literal["pairs", "best"] = "pairs"
    """pairs: the best answer of each prompt against the worst, as preferences. best: the best answer alone, as a chat for sft, of which nothing but that answer is learned."""
    rewards: Rewards
    """What an answer is worth: the weighted sum of these rewards."""
    completions_per_prompt: int = Field(default=8, ge=1, le=1024)
    """Completions of each prompt; of pairs at least 2. The first of them are the same however many there are."""
    max_prompt_tokens: int = Field(ge=1)
    """Longest prompt, in tokens. A longer one is dropped and counted, never cut."""
    max_new_tokens: int = Field(ge=1)
    """Longest completion, in tokens, the one that ends it included. One that is cut off there is counted, and never chosen or rejected."""
    min_new_tokens: int = Field(default=1, ge=1)
    """Shortest completion that may be chosen or rejected, in tokens, the one that ends it included."""
    temperature: Temperature = 1.0
    """Completions are drawn from softmax(logits / temperature), from 0.001 to 100."""
    top_p: Nucleus = 1.0
    """Tokens are drawn from the smallest set that holds this much of the probability."""
    min_margin: Weight = 0.0
    """By how much the best answer must score more than the worst, or the prompt gives no pair. 0: by anything."""
    min_score: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    """What the best answer must score at least, or the prompt is left out. null: anything."""
    skip_prompts: int = Field(default=0, ge=0)
    """The first so many training prompts are left out: those that an earlier round asked."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Training prompts that are asked at most, from there on. null: all."""
    max_heldout_prompts: int | None = Field(default=None, ge=1)
    """Held-out prompts that are asked at most: the first so many. null: all."""
    max_dropped_fraction: float = Field(default=0.5, ge=0, lt=1)
    """The stage stops if a larger share of the prompts than this cannot be asked."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the policy's weights while it writes."""

    @model_validator(mode="after")
    def pairs_have_two_sides(self) -> SamplePreferencesParams:
        if self.write == "pairs" and self.completions_per_prompt < 2:
            raise ValueError("completions_per_prompt is 1, and a pair has two answers: take more, or write: best")
        if self.write == "best" and self.min_margin:
            raise ValueError("min_margin is between the two answers of a pair, and write is best: remove it")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self


def output_kind(params: SamplePreferencesParams, inputs: Mapping[str, Kind]) -> Kind:
    """Preferences, or chats: both with a training and a held-out side."""
    return Kind.PREFERENCES if params.write == "pairs" else Kind.CHATS


def estimate(forecast: Forecast) -> Estimate:
    """The weights in memory: each process holds the whole policy, and the whole reward model in float32."""
    params: SamplePreferencesParams = forecast.params
    model, reward = (forecast.inputs.get(role, Estimate()).parameters for role in ("model", "reward"))
    if model is None or ("reward" in forecast.inputs and reward is None):
        return Estimate()
    return Estimate(memory_bytes_per_rank=model * BYTES[params.precision] + (reward or 0) * BYTES["fp32"])


def check(forecast: Forecast) -> list[Problem]:
    """What is wrong with inputs and lengths, found before the step runs."""
    params: SamplePreferencesParams = forecast.params
    problems = reward_model_problems(forecast, params.rewards)
    virtual = 0
    if (adapter := forecast.inputs.get("adapter", Estimate()).folder) is not None:
        unreadable = unreadable_adapter(adapter)
        problems += unreadable
        virtual = 0 if unreadable else virtual_tokens_in(adapter)
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    problems += length_problems(architecture, longest_asked(params, virtual), **room_said(params, virtual))
    problems += noise_problems(architecture) + untaught_problems(forecast)
    return problems + untemplated_problems(forecast, ["reward"] if learned(params.rewards) else [])


@on_template_date
def run(ctx: Context, params: SamplePreferencesParams) -> Result:
    from dataclasses import replace

    from stages.lib.models.config import read_config
    from stages.lib.on_policy.scoring import require_scorable
    from stages.lib.processes.collectives import from_main
    from stages.lib.processes.joining import join_processes
    from stages.lib.text.chat_check import check_chat_template
    from stages.lib.text.prompts import open_prompts
    from stages.lib.text.tokenizers import load_tokenizer
    from stages.lib.training.scheduling import seed_of

    # Nothing is trained: there is no state to divide among processes.
    ctx = replace(ctx, resources=ctx.resources.model_copy(update={"deepspeed": None}))
    device = join_processes(ctx)
    virtual = virtual_tokens_in(ctx.inputs["adapter"]) if "adapter" in ctx.inputs else 0
    require_length(read_config(ctx.inputs["model"]), longest_asked(params, virtual), **room_said(params, virtual))
    home = tokenizer_to_train_with(ctx.inputs)
    tokenizer = load_tokenizer(home)
    check_chat_template(tokenizer, str(home))
    train, heldout, ledger = open_prompts(ctx, tokenizer, "chat", params.max_prompt_tokens, params.max_dropped_fraction)
    asked = {
        "train": asked_of(train, params.skip_prompts, params.max_prompts, "skip_prompts", ledger),
        "heldout": asked_of(heldout, 0, params.max_heldout_prompts, "max_heldout_prompts", ledger),
    }
    require_scorable(ctx, params.rewards, [row for side in asked.values() for row in side])
    writer = open_writer(ctx, params, tokenizer, device)
    seeds = {"train": ctx.seed, "heldout": seed_of(ctx.seed, HELDOUT_SEED)}
    drawn = {split: writer.draw(split, side, seeds[split]) for split, side in asked.items()}
    names = writer.scorer.names
    # One process alone holds all completions.
    return from_main(
        lambda: write_sampled(
            ctx,
            [side_of(ctx, params, names, split, side, drawn[split], ledger) for split, side in asked.items()],
            ledger,
        )
    )


STAGE = Stage(
    kind="sample_preferences",
    version=1,
    summary="preferences, or best answers, of a policy's own completions, ranked by a reward model or rewards in code",
    params=SamplePreferencesParams,
    inputs={
        "model": accepts(Kind.CAUSAL_LM),
        "prompts": accepts(
            *(Kind.PROMPTS, Kind.CHATS, Kind.PREFERENCES, Kind.UNPAIRED_PREFERENCES, Kind.RATINGS, Kind.STEP_LABELS),
            Kind.TEXT,
        ),
        "reward": accepts(Kind.REWARD_MODEL, Kind.PROCESS_REWARD_MODEL, optional=True),
        "adapter": accepts(Kind.ADAPTER, Kind.CAUSAL_LM, optional=True),
    },
    output=output_kind,
    run=run,
    headline=("heldout_reward", "heldout_reward_best", "heldout_margin", "heldout_ended", "rows_kept"),
    distributed=True,
    estimate=estimate,
    check=check,
)


HELDOUT_SEED = 1
"""Keeps the random numbers of held-out completions apart from those of training."""


def longest_asked(params: SamplePreferencesParams, virtual: int) -> int:
    """Tokens of the longest prompt and completion, behind the virtual ones of the policy's adapter."""
    return params.max_prompt_tokens + params.max_new_tokens + virtual


def room_said(params: SamplePreferencesParams, virtual: int) -> dict[str, str]:
    """How a prompt and completion that are longer than the model takes are told."""
    behind = f" behind {virtual} virtual tokens" if virtual else ""
    what = f"{params.max_prompt_tokens} and max_new_tokens {params.max_new_tokens}{behind} are {{tokens}}"
    return {"where": "params.max_prompt_tokens", "what": what, "hint": "Lower one of them."}


def asked_of(prompts: Prompts, skip: int, most: int | None, named: str, ledger: Ledger) -> list[PromptRow]:
    """The prompts that are asked; the others are counted as `not_asked`. Raises `DataError` if none is left."""
    asked = prompts.rows[skip:][:most]
    if not asked:
        what = f"{skip:,} leaves none of the {len(prompts):,} prompts"
        raise DataError(Problem(f"params.{named}", what, "Lower it."))
    if left := len(prompts) - len(asked):
        ledger.drop("not_asked", "prompts outside of skip_prompts, max_prompts and max_heldout_prompts", left)
    return list(asked)


def open_writer(
    ctx: Context, params: SamplePreferencesParams, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> CandidateWriter:
    """The policy, under its adapter if it has one, and what scores its completions, in this process's memory."""
    from stages.lib.generating.replies import stop_ids_of
    from stages.lib.models.adapters.opening import open_adapted
    from stages.lib.models.loading import DTYPES, load_language_model, require_vocabulary
    from stages.lib.on_policy.candidates import CandidateWriter
    from stages.lib.on_policy.contained_calls import Means
    from stages.lib.on_policy.scoring import RewardModelScorer, Scorer
    from stages.lib.text.tokenizers import stop_token_ids

    def load(folder: Any) -> Any:
        return load_language_model(folder).to(device, DTYPES[params.precision])

    model = None
    if "adapter" in ctx.inputs:
        shown, adapters = ctx.origin("model")[0], {"inputs.adapter": ctx.inputs["adapter"]}
        model = open_adapted(ctx.inputs["model"], adapters, load, shown=shown, say=ctx.journal.note).use(
            "inputs.adapter"
        )
    model = load(ctx.inputs["model"]) if model is None else model.to(device)
    require_vocabulary(model, tokenizer)
    judge, reward = None, learned(params.rewards)
    if reward is not None:
        size, penalty = ctx.resources.micro_batch_size or 8, reward.uncertainty_penalty
        judge = RewardModelScorer(ctx.inputs["reward"], None, "fp32", device, size, penalty)
    return CandidateWriter(
        ctx=ctx,
        model=model,
        tokenizer=tokenizer,
        stop_ids=sorted({*stop_ids_of(model, tokenizer), *stop_token_ids(tokenizer)}),
        scorer=Scorer(params.rewards, judge, Means(ctx.resources.threads_per_process, ctx.going_on_alone)),
        completions_per_prompt=params.completions_per_prompt,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
    )


def side_of(
    ctx: Context,
    params: SamplePreferencesParams,
    names: Sequence[str],
    split: str,
    prompts: list[PromptRow],
    drawn: DrawnCandidates,
    ledger: Ledger,
) -> SampledRows:
    """The rows that one side's prompts become, in their order; what gives none is in the ledger.

    Raises `DataError` if no prompt gives a row.
    """
    from stages.lib.on_policy.sampled_rows import SampledRows
    from stages.lib.preferring.reference import identity_of

    found = drawn.read()
    adapter = ctx.inputs.get("adapter")
    side = SampledRows(split, identity_of(ctx.inputs["model"], adapter), names)
    for row in prompts:
        if params.write == "pairs":
            side.add_pair(row, found[row.index], params.min_margin, params.min_score, ledger)
        else:
            side.add_best(row, found[row.index], params.min_score, ledger)
    if not side.rows:
        what = f"none of the {len(prompts):,} {split} prompts gives a row: {side.told_faults()}"
        hint = "Raise completions_per_prompt, max_new_tokens or temperature, or lower min_margin, min_score or min_new_tokens."
        raise DataError(Problem("inputs.prompts", what, hint))
    return side


def write_sampled(ctx: Context, sides: list[SampledRows], ledger: Ledger) -> Result:
    """Writes the rows of both sides, every completion that was drawn, and the ledger: rows in = rows out + dropped."""
    from stages.lib.on_policy.sampled_rows import faults_of

    ledger.kept = sum(len(side.rows) for side in sides)
    assert ledger.read == ledger.kept + sum(ledger.dropped.values()), "every prompt was kept or dropped"
    for side in sides:
        write_rows(ctx.out / f"{side.split}.jsonl", side.rows)
    write_rows(ctx.out / "completions.jsonl", [drawn for side in sides for drawn in side.drawn])
    ledger.write(ctx.out)
    faults = faults_of(sides)
    for what, prefix in (("of no use", "completions_"), ("rewards had trouble with", "errors_")):
        found = {name.removeprefix(prefix): int(count) for name, count in faults.items() if name.startswith(prefix)}
        said = ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"
        ctx.journal.note(f"{int(faults['completions']):,} completions; {what}: {said}")
    metrics = {name: value for side in sides for name, value in side.metrics().items()}
    train, heldout = sides
    facts = Facts(train_rows=len(train.rows), heldout_rows=len(heldout.rows), dropped_rows=dict(ledger.dropped))
    return Result({**metrics, **faults, **ledger.metrics()}, facts)
