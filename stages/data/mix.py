"""The stage `mix`: splits off the held-out rows, then draws the training rows from the sources in the wanted shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import DataError, Problem, RecipeError, did_you_mean
from pipeline.settings.strict import Strict
from pipeline.stage import Context, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from pipeline.store.numbers import json_text
from stages.lib.curation.mixing import (
    SourceRow,
    SourceRows,
    Unit,
    amounts_by_weight,
    draw,
    drop,
    heldout_order,
    refuse_small_sources,
    split,
    training_order,
)
from stages.lib.rows.canonical import (
    FORMATS,
    Row,
    content_digest,
    digest_text,
    encode_row,
    format_of_kind,
    format_of_row,
    judged_text,
)
from stages.lib.rows.ledger import Ledger

TOKENIZED_AT_ONCE = 256
"""Rows handed to the tokenizer in one call."""


class MixParams(Strict):
    """Which rows are held out, and how much of each source is trained on."""

    heldout_fraction: Annotated[float, Field(ge=1e-6, lt=1.0)] | None = None
    """Share of groups (or of prompts, contexts, texts) that is held out, from 0 to 1. It is taken before mixing. null: 0.05, or none where heldout_sources names what is held out."""
    heldout_sources: list[str] = []
    """Sources that are held out whole, such as an official test set: no row of them is trained on, nor any that says the same or begins with the same prompt."""
    heldout_salt: str = "slipway"
    """Rows are held out by the hash of this and of what they share: with the same salt and fraction the same groups and prompts are held out in every data set of a recipe."""
    max_heldout_rows: int | None = Field(default=None, ge=1)
    """Most held-out rows: those with the smallest hash. The others are not trained on either. null: all."""
    split_by: Literal["prompt", "context", "content", "group"] | None = None
    """What rows share that must stay on one side: the first user message (of questions: the question), the context, or the whole text or chat. Rows with a `group` go by that instead; `group` asks for one in every row. null: prompt for chats and preferences, context for questions, content for the rest."""
    weights: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] | None = None
    """Source -> its share of the training data, counted in `unit`, each from 0.000001 to 1,000,000; only the proportions count. null (and no budgets): every row once."""
    budgets: dict[str, int] | None = None
    """Source -> how much of it is trained on, counted in `unit`."""
    unit: Unit = "rows"
    """What weights and budgets count. Tokens are counted with the input `tokenizer`."""
    on_exhausted: Literal["stop", "repeat"] = "stop"
    """Where a source is smaller than its share asks. stop: no row is used twice; with weights, the mix ends when the first source is used up. repeat: rows are used again; with weights, the mix ends when every source has been used up once."""
    max_repeats: int = Field(default=4, ge=1)
    """With `on_exhausted: repeat`, how many times any row may be used."""

    @model_validator(mode="after")
    def check_amounts(self) -> MixParams:
        if self.weights is not None and self.budgets is not None:
            raise ValueError("weights and budgets exclude each other. Give one of them.")
        for name, amounts in (("weights", self.weights), ("budgets", self.budgets)):
            if amounts is not None and not (amounts and all(amount > 0 for amount in amounts.values())):
                raise ValueError(
                    f"{name}: every source needs a number above 0. Leave a source out of the inputs instead."
                )
        if self.amounts is None and (self.unit != "rows" or self.on_exhausted != "stop"):
            raise ValueError("unit and on_exhausted: are for weights or budgets, and there are none.")
        if self.on_exhausted == "stop" and self.max_repeats != MixParams.model_fields["max_repeats"].default:
            raise ValueError("max_repeats: is for `on_exhausted: repeat`.")
        return self

    @property
    def fraction(self) -> float:
        """The share that is held out of the sources that are not held out whole."""
        if self.heldout_fraction is None:
            return 0.0 if self.heldout_sources else 0.05
        return self.heldout_fraction

    @property
    def amounts(self) -> Mapping[str, float] | None:
        return self.weights if self.weights is not None else self.budgets


ROWS_KINDS = [format.rows_kind for format in FORMATS.values()]


def output_kind(params: MixParams, inputs: Mapping[str, Kind]) -> Kind:
    """The kind of the mixed data set. Raises `RecipeError` if the sources are of different kinds."""
    kinds = {role.removeprefix("sources."): kind for role, kind in inputs.items() if kind in ROWS_KINDS}
    if not kinds:
        raise KeyError("sources")  # Their own problems are reported where they stand.
    if len(set(kinds.values())) != 1:
        given = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise RecipeError(f"the sources must all be of one kind ({given}). Mix each kind in a stage of its own.")
    format = FORMATS[format_of_kind(next(iter(kinds.values())))]
    if params.split_by not in (None, "group", "content", *format.shared):
        known = ", ".join(dict.fromkeys(["group", *format.shared, "content"]))
        raise RecipeError(f"params.split_by: {format.mixed_kind} have no {params.split_by}. Known: {known}.")
    return format.mixed_kind


def check(forecast: Forecast) -> list[Problem]:
    """Sources without an amount, amounts without a source, and tokens without a tokenizer."""
    params: MixParams = forecast.params
    sources = [role.removeprefix("sources.") for role in forecast.inputs if role.startswith("sources.")]
    problems = [
        Problem("params.heldout_sources", f"'{unknown}' is no source of this stage", did_you_mean(unknown, sources))
        for unknown in params.heldout_sources
        if unknown not in sources
    ]
    if sources and not set(sources) - set(params.heldout_sources):
        problems.append(Problem("params.heldout_sources", "leaves no source to train on", "Add one to the inputs."))
    name = "weights" if params.weights is not None else "budgets"
    if params.amounts is not None:
        for heldout in params.amounts.keys() & set(params.heldout_sources):
            problems.append(Problem(f"params.{name}.{heldout}", "is held out whole", "Remove it here."))
        for unknown in params.amounts.keys() - set(sources):
            hint = did_you_mean(unknown, sources)
            problems.append(Problem(f"params.{name}.{unknown}", "is no source of this stage", hint))
        for missing in set(sources) - params.amounts.keys() - set(params.heldout_sources):
            problems.append(Problem(f"params.{name}", f"says nothing of the source '{missing}'", "Add it."))
    if params.unit == "tokens" and "tokenizer" not in forecast.inputs:
        hint = "Add `tokenizer` to the stage's inputs, or count characters."
        problems.append(Problem("params.unit", "is tokens, and the stage has no tokenizer to count them with", hint))
    return sorted(problems, key=str)


def run(ctx: Context, params: MixParams) -> Result:
    folders = dict(sorted(ctx.group("sources").items()))
    tokenizer = ctx.inputs.get("tokenizer")
    count_tokens = token_counter(tokenizer) if tokenizer else None
    sources = [read_source_rows(name, folder / "rows.jsonl", params, count_tokens) for name, folder in folders.items()]
    for source in sources:
        source.is_heldout = source.name in params.heldout_sources
    ledger = Ledger(read=sum(len(source.rows) for source in sources))
    split(sources, params.fraction, params.max_heldout_rows, ledger)
    require_both_sides(sources, params)
    plan(sources, params, ctx)
    for source in sources:
        draw(source, params.unit, ctx.seed)
        drawn = {row.offset for _, row in source.drawn}
        drop(ledger, "not_drawn", source, [row for row in source.training if row.offset not in drawn])
        ledger.kept += len(drawn) + len(source.heldout)
    write_side(ctx.out / "train.jsonl", training_order(sources, ctx.seed))
    write_side(ctx.out / "heldout.jsonl", heldout_order(sources))
    ledger.write(ctx.out)
    mixture = describe(sources, params, has_tokens=tokenizer is not None)
    (ctx.out / "mixture.json").write_text(json_text(mixture, "mixture.json", indent=1) + "\n", encoding="utf-8")
    report(mixture, ledger, ctx)
    return result(mixture, ledger)


STAGE = Stage(
    kind="mix",
    version=1,
    summary="Splits off held-out rows, then draws training rows from several sources in the wanted shares.",
    params=MixParams,
    inputs={"sources": accepts(*ROWS_KINDS, many=True), "tokenizer": accepts(Kind.TOKENIZER, optional=True)},
    output=output_kind,
    run=run,
    check=check,
)


# Reading


def read_source_rows(
    name: str, path: Path, params: MixParams, count_tokens: Callable[[list[str]], list[int]] | None
) -> SourceRows:
    """Every row of a source, hashed and measured."""
    rows: list[SourceRow] = []
    with path.open("rb") as file:
        offset = 0
        while lines := list(islice(file, TOKENIZED_AT_ONCE)):
            texts = []
            for line in lines:
                row = json.loads(line)
                format_name = format_of_row(row)
                texts.append(judged_text(row, format_name))
                rows.append(measure(row, format_name, offset, len(texts[-1]), name, params))
                offset += len(line)
            if count_tokens:
                for measured, tokens in zip(rows[-len(lines) :], count_tokens(texts), strict=True):
                    measured.tokens = tokens
    return SourceRows(name, path, rows)


def measure(row: Row, format: str, offset: int, characters: int, name: str, params: MixParams) -> SourceRow:
    """The row's hashes and sizes. Whether it is held out depends on nothing but the salt and what it shares."""
    by = FORMATS[format].default_split if params.split_by in (None, "group") else params.split_by
    key = f"{by}:{FORMATS[format].split_key(row, by)}"
    if "group" not in row and params.split_by == "group":
        hint = "Name the field that holds it as `columns: {group: ...}` of the source, or split by something else."
        raise DataError(Problem(f"sources.{name}", f"a row has no group: {json_text(row, 'row')[:200]}", hint))
    side = f"group:{row['group']}" if "group" in row else key
    digest = hashlib.sha256(f"{params.heldout_salt}\0{side}".encode()).digest()
    return SourceRow(
        offset=offset,
        content=content_digest(row, format),
        shared=digest_text(key),
        rank=int.from_bytes(digest[:8]) / 2**64,
        characters=characters,
    )


def token_counter(folder: Path) -> Callable[[list[str]], list[int]]:
    """Texts -> how many tokens each has, without the special ones that a chat template or a packer adds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


# The plan


def require_both_sides(sources: list[SourceRows], params: MixParams) -> None:
    """Raises `DataError` if a side has no rows."""
    different = len({row.rank for source in sources for row in source.rows})
    total = sum(len(source.rows) for source in sources)
    what = f"of {total:,} rows in {different:,} groups"
    if not any(source.heldout for source in sources):
        hint = "Raise heldout_fraction, take another heldout_salt, or give the sources more rows."
        raise DataError(Problem("params.heldout_fraction", f"{params.fraction} holds out none {what}", hint))
    to_train = [source for source in sources if not source.is_heldout]
    empty = [source for source in to_train if not source.training]
    if empty and (params.amounts is not None or len(empty) == len(to_train)):
        names = ", ".join(source.name for source in empty)
        hint = "Lower heldout_fraction, or leave the source out."
        raise DataError(
            Problem("params.heldout_fraction", f"{params.fraction} leaves no row to train on in {names}", hint)
        )


def plan(sources: list[SourceRows], params: MixParams, ctx: Context) -> None:
    """Sets what is asked of each source, and says so before anything is written."""
    available = {source.name: sum(row.amount(params.unit) for row in source.training) for source in sources}
    repeats = params.max_repeats if params.on_exhausted == "repeat" else 1
    if params.weights is not None:
        planned = amounts_by_weight(params.weights, available, params.on_exhausted, repeats)
    elif params.budgets is not None:
        planned = params.budgets
        refuse_small_sources(planned, available, repeats, params.unit)
    else:
        planned = available
    total = sum(planned.values())
    for source in sources:
        if source.is_heldout:
            ctx.journal.note(f"plan: {source.name}: held out whole, {len(source.heldout):,} rows")
            continue
        asked, there = planned[source.name], available[source.name]
        source.planned = asked if params.amounts is not None else None
        ctx.journal.note(
            f"plan: {source.name}: {asked:,} of {there:,} {params.unit}, {asked / max(there, 1):.2f} times over, "
            f"{asked / total:.1%} of the training data; {len(source.heldout):,} rows held out"
        )


# Writing


def write_side(path: Path, rows: Iterable[tuple[SourceRows, SourceRow]]) -> None:
    """Writes the rows in this order, each with the name of its source."""
    with ExitStack() as stack, path.open("wb") as out:
        files: dict[Path, Any] = {}
        for source, row in rows:
            if source.path not in files:
                files[source.path] = stack.enter_context(source.path.open("rb"))
            file = files[source.path]
            file.seek(row.offset)
            out.write(encode_row({**json.loads(file.readline()), "source": source.name}))


def describe(sources: list[SourceRows], params: MixParams, *, has_tokens: bool) -> dict[str, Any]:
    """`mixture.json`: what was planned and what became of it, per source and in all."""

    def sizes(rows: list[SourceRow]) -> dict[str, int]:
        units: list[Unit] = ["rows", "characters", "tokens"] if has_tokens else ["rows", "characters"]
        return {unit: sum(row.amount(unit) for row in rows) for unit in units}

    everything = [row for source in sources for _, row in source.drawn]
    total = sum(row.amount(params.unit) for row in everything)
    return {
        "unit": params.unit,
        "on_exhausted": params.on_exhausted,
        "train": sizes(everything),
        "heldout": sizes([row for source in sources for row in source.heldout]),
        "sources": {
            source.name: {
                "available": sizes(source.training),
                "planned": source.planned,
                "train": sizes([row for _, row in source.drawn]),
                "epochs": round(len(source.drawn) / max(len(source.training), 1), 6),
                "most_uses_of_a_row": max((times + 1 for times, _ in source.drawn), default=0),
                "share": round(sum(row.amount(params.unit) for _, row in source.drawn) / total, 6),
                "heldout": sizes(source.heldout),
            }
            for source in sources
        },
    }


def report(mixture: Mapping[str, Any], ledger: Ledger, ctx: Context) -> None:
    """Tells the user what became of the plan."""
    for name, source in mixture["sources"].items():
        if not source["available"]["rows"]:
            continue
        parts = ", ".join(f"{amount:,} {unit}" for unit, amount in source["train"].items())
        ctx.journal.note(
            f"drawn: {name}: {parts}, {source['epochs']:.2f} times over, {source['share']:.1%} of the training data"
        )
    for reason, number in ledger.dropped.most_common():
        ctx.journal.note(f"dropped {number:,}: {reason}")
    rows = mixture["train"]["rows"], mixture["heldout"]["rows"]
    ctx.journal.note(f"{rows[0]:,} training rows, {rows[1]:,} held-out rows")


def result(mixture: Mapping[str, Any], ledger: Ledger) -> Result:
    train, heldout = mixture["train"], mixture["heldout"]
    metrics = {f"train_{unit}": float(amount) for unit, amount in train.items()}
    metrics |= {f"heldout_{unit}": float(amount) for unit, amount in heldout.items()}
    metrics |= {f"share_{name}": float(source["share"]) for name, source in mixture["sources"].items()}
    metrics |= {f"epochs_{name}": float(source["epochs"]) for name, source in mixture["sources"].items()}
    metrics |= {name: number for name, number in ledger.metrics().items() if name.startswith("dropped_")}
    facts = Facts(
        train_rows=train["rows"],
        heldout_rows=heldout["rows"],
        train_tokens=train.get("tokens"),
        heldout_tokens=heldout.get("tokens"),
        dropped_rows=dict(sorted(ledger.dropped.items())),
    )
    return Result(metrics, facts)
