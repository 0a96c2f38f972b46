"""The stage `evaluate`: any number of models side by side on the same held-out rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.artifact import MANIFEST, Kind, read_manifest
from pipeline.errors import ArtifactError, DataError, Problem
from pipeline.stage import Context, Forecast, Result, Stage, accepts
from pipeline.strict import Strict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.lib.perplexity import ScoredRow

Messages = list[dict[str, str]]


class GenerationParams(Strict):
    heldout_prompts: int = Field(default=4, ge=0)
    """Held-out chats of which each model writes the last assistant turn: the first so many that fit all models."""
    prompts: list[str] = []
    """User messages to which each model replies as well."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest reply, in tokens. One that is cut off there is marked as truncated."""
    temperature: float = Field(default=0.0, ge=0)
    """0 always takes the likeliest token; above, tokens are drawn with the seed of the step, the higher the freer."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the smallest set that holds this much of the probability."""


class EvaluateParams(Strict):
    heldout_blocks: int | None = Field(default=None, ge=1)
    """Blocks of held-out tokens on which perplexity is measured: the first so many. null: all."""
    heldout_chats: int | None = Field(default=None, ge=1)
    """Held-out chats on which the loss of assistant tokens is measured: the first so many. null: all."""
    heldout_pairs: int | None = Field(default=None, ge=1)
    """Held-out preference pairs on which accuracy is measured: the first so many. null: all."""
    generation: GenerationParams | None = None
    """Replies that every model writes to the same prompts, for reading. null: none."""


def check(forecast: Forecast) -> list[Problem]:
    """Inputs that nothing is measured on, and options that nothing would use."""
    params: EvaluateParams = forecast.params
    roles = {role.split(".")[0] for role in forecast.inputs}
    generation = params.generation
    problems = [
        Problem(f"params.{option}", f"has no effect without the input {role}", f"Add it to inputs, or remove {option}.")
        for option, role in (("heldout_blocks", "tokens"), ("heldout_chats", "chats"), ("heldout_pairs", "preferences"))
        if getattr(params, option) is not None and role not in roles
    ]
    if "reward_models" in roles and "preferences" not in roles:
        problems.append(Problem("inputs.reward_models", "are judged by preferences", "Add preferences to inputs."))
    if generation is not None and generation.heldout_prompts and "chats" not in roles:
        where = "params.generation.heldout_prompts"
        problems.append(Problem(where, "are taken from the input chats", "Add it to inputs, or write 0 here."))
    if generation is not None and not generation.heldout_prompts and not generation.prompts:
        problems.append(Problem("params.generation", "has no prompts", "Give heldout_prompts or prompts."))
    if not roles & {"tokens", "chats", "preferences"} and generation is None:
        problems.append(Problem("inputs", "there is nothing to measure on", "Add tokens, chats or preferences."))
    return problems


def run(ctx: Context, params: EvaluateParams) -> Result:
    from stages.lib.distributed import use_threads

    use_threads(ctx.resources)
    subjects = [Subject.open(name, folder) for name, folder in ctx.group("models").items()]
    judges = [Subject.open(name, folder) for name, folder in ctx.group("reward_models").items()]
    rows = Rows()
    if "tokens" in ctx.inputs:
        add_text(ctx, params, subjects, rows)
    if "chats" in ctx.inputs:
        add_chats(ctx, params, subjects, rows)
    if "preferences" in ctx.inputs:
        add_pairs(ctx, params, subjects, judges, rows)
    prompts = choose_prompts(params.generation, rows)
    for done, subject in enumerate([*subjects, *judges]):
        ctx.journal.write("progress", what=f"evaluate {subject.name}", done=done, total=len(subjects) + len(judges))
        path = ctx.work / f"measured-{'reward' if subject in judges else 'model'}-{subject.name}.json"
        if path.exists():
            subject.results = json.loads(path.read_bytes())
            continue
        subject.results = judge(ctx, subject) if subject in judges else measure(ctx, params, subject, rows, prompts)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(subject.results, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
    metrics = flatten([*subjects, *judges])
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise ArtifactError(Problem(f"models: {bad[0]}", f"is {metrics[bad[0]]}", "Look at this model's weights."))
    metrics |= rows.baselines
    write_report(ctx, subjects, judges, rows, prompts)
    return Result(metrics)


STAGE = Stage(
    kind="evaluate",
    version=1,
    summary="models side by side: perplexity, loss on chats, preference accuracy, sample replies",
    params=EvaluateParams,
    inputs={
        "models": accepts(Kind.CAUSAL_LM, Kind.QUANTIZED_LM, many=True),
        "reward_models": accepts(Kind.REWARD_MODEL, optional=True, many=True),
        "tokens": accepts(Kind.TOKENS, optional=True),
        "chats": accepts(Kind.CHATS, optional=True),
        "preferences": accepts(Kind.PREFERENCES, optional=True),
    },
    output=Kind.REPORT,
    run=run,
    headline=("heldout_perplexity.",),
    check=check,
)


@dataclass
class Subject:
    """A model that is measured, and what was found."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str
    template_digest: str | None
    context_tokens: int | None
    """How many tokens it reads at once; None if its config sets no limit."""
    text: list[ScoredRow] = field(default_factory=list)
    text_tokens: int = 0
    """All tokens of the held-out text in its tokenizer, of which it predicts those that have one before them."""
    chats: list[ScoredRow] = field(default_factory=list)
    pairs: list[tuple[ScoredRow, ScoredRow]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    """`measures`: name -> number; `facts`: name -> what the model is; `replies`: one per prompt."""

    @classmethod
    def open(cls, name: str, folder: Path) -> Subject:
        from stages.lib.models import read_config
        from stages.lib.tokenization import chat_template_digest, load_tokenizer, tokenizer_digest

        tokenizer = load_tokenizer(folder)
        length = read_config(folder).get("max_position_embeddings")
        return cls(name, folder, tokenizer, tokenizer_digest(tokenizer), chat_template_digest(tokenizer), length)

    def length(self, otherwise: int = 2**31) -> int:
        return min(self.context_tokens or otherwise, otherwise)


@dataclass
class Rows:
    """The held-out rows that all models are measured on."""

    text_blocks: int = 0
    text_bytes: int = 0
    chats: list[Messages] = field(default_factory=list)
    chats_left_out: int = 0
    pairs: list[dict[str, Any]] = field(default_factory=list)
    pairs_left_out: int = 0
    baselines: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, dict[str, int]]:
        return {
            "text": {"blocks": self.text_blocks, "bytes": self.text_bytes},
            "chats": {"used": len(self.chats), "left_out": self.chats_left_out},
            "pairs": {"used": len(self.pairs), "left_out": self.pairs_left_out},
        }

    @property
    def chat_bytes(self) -> int:
        """Bytes of what the assistant says."""
        return sum(len(m["content"].encode()) for messages in self.chats for m in messages if m["role"] == "assistant")


def add_text(ctx: Context, params: EvaluateParams, subjects: Sequence[Subject], rows: Rows) -> None:
    """The first blocks of held-out tokens, and the same text in the tokens of models with another tokenizer."""
    from stages.lib.perplexity import document_pieces, encode_text_rows, heldout_text
    from stages.lib.tokenization import load_tokenizer, tokenizer_digest
    from stages.lib.tokens import PackedTokens

    folder = ctx.inputs["tokens"]
    packed, packer = PackedTokens(folder, "heldout"), load_tokenizer(folder)
    digest = tokenizer_digest(packer)
    rows.text_blocks = len(packed) if params.heldout_blocks is None else min(params.heldout_blocks, len(packed))
    if not rows.text_blocks:
        raise DataError(Problem("inputs.tokens", "has no whole block of held-out tokens", "Hold out more in the mix."))
    own, text = document_pieces(packed, rows.text_blocks), heldout_text(packed, packer, rows.text_blocks)
    rows.text_bytes = text.num_bytes
    for subject in subjects:
        if subject.tokenizer_digest != digest:
            subject.text, subject.text_tokens = encode_text_rows(
                subject.tokenizer, text, packed, subject.length(packed.sequence_length)
            )
        elif subject.length(packed.sequence_length) < packed.sequence_length:
            raise DataError(
                Problem(
                    f"inputs.models.{subject.name}",
                    f"reads {subject.context_tokens} tokens, and the blocks of inputs.tokens have {packed.sequence_length}",
                    "Pack blocks that all models read.",
                )
            )
        else:
            subject.text, subject.text_tokens = own, text.num_tokens


def add_chats(ctx: Context, params: EvaluateParams, subjects: Sequence[Subject], rows: Rows) -> None:
    """The first held-out chats that every model reads whole."""
    from stages.lib.perplexity import chat_row
    from stages.lib.rows import read_rows

    read = list(islice(read_rows(ctx.inputs["chats"] / "heldout.jsonl"), params.heldout_chats))
    for row in read:
        encoded = [chat_row(subject.tokenizer, row["messages"], subject.length()) for subject in subjects]
        if all(each is not None for each in encoded):
            rows.chats.append(row["messages"])
            for subject, each in zip(subjects, encoded, strict=True):
                subject.chats.append(each)
    rows.chats_left_out = len(read) - len(rows.chats)
    require_rows("inputs.chats", len(read), len(rows.chats))


def add_pairs(
    ctx: Context, params: EvaluateParams, subjects: Sequence[Subject], judges: Sequence[Subject], rows: Rows
) -> None:
    """The first held-out pairs that every model reads whole and tells apart; and how often the longer answer is chosen."""
    import torch

    from stages.lib.perplexity import pair_rows
    from stages.lib.preferences import wins
    from stages.lib.rows import read_rows

    read = list(islice(read_rows(ctx.inputs["preferences"] / "heldout.jsonl"), params.heldout_pairs))
    for row in read:
        encoded = [pair_rows(each.tokenizer, row, each.length()) for each in (*subjects, *judges)]
        if all(each is not None for each in encoded):
            rows.pairs.append(row)
            for subject, each in zip((*subjects, *judges), encoded, strict=True):
                subject.pairs.append(each)
    rows.pairs_left_out = len(read) - len(rows.pairs)
    require_rows("inputs.preferences", len(read), len(rows.pairs))
    lengths_N2 = torch.tensor(
        [[sum(len(m["content"]) for m in row[side]) for side in ("chosen", "rejected")] for row in rows.pairs]
    )
    rows.baselines["heldout_preference_accuracy_longer"] = float(wins(*lengths_N2.unbind(1)).mean())


def require_rows(where: str, read: int, kept: int) -> None:
    if not kept:
        what = f"none of its {read} held-out rows fits all models" if read else "has no held-out rows"
        raise DataError(Problem(where, what, "Hold out more rows, or shorter ones."))


def choose_prompts(params: GenerationParams | None, rows: Rows) -> list[dict[str, Any]]:
    """`prompt` and, where it comes from a held-out chat, the `reference`: the assistant turn that was held out."""
    if params is None:
        return []
    prompts = []
    for messages in rows.chats[: params.heldout_prompts]:
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        prompts.append({"prompt": messages[:last], "reference": messages[last]["content"]})
    return prompts + [{"prompt": [{"role": "user", "content": each}], "reference": None} for each in params.prompts]


def measure(
    ctx: Context, params: EvaluateParams, subject: Subject, rows: Rows, prompts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The measures of one language model, and its replies."""
    from stages.lib.distributed import device_type
    from stages.lib.generation import load_language_model
    from stages.lib.perplexity import bits_per_byte, score

    batch_size = ctx.resources.micro_batch_size or 8
    model = load_language_model(subject.folder, device_type(ctx.resources))
    measures: dict[str, float] = {}
    if subject.text:
        text = score(model, subject.text, batch_size)
        measures["heldout_perplexity"] = text.perplexity
        measures["heldout_bits_per_byte"] = bits_per_byte(text, subject.text_tokens, rows.text_bytes)
    if subject.chats:
        chats = score(model, subject.chats, batch_size)
        measures["heldout_assistant_loss"] = chats.loss
        # Every token of what the assistant says is predicted, so nothing stands for anything else here.
        measures["heldout_assistant_bits_per_byte"] = bits_per_byte(chats, chats.tokens, rows.chat_bytes)
    if subject.pairs:
        measures |= preference_measures(model, subject.pairs, batch_size)
    replies = [write_reply(ctx, params, model, subject.tokenizer, index, each) for index, each in enumerate(prompts)]
    if replies:
        measures["truncated_replies"] = sum(each["truncated"] for each in replies) / len(replies)
    facts = {"parameters": num_weights(model), "vocabulary": len(subject.tokenizer)}
    return {"measures": measures, "facts": facts, "replies": replies}


def num_weights(model: PreTrainedModel) -> int:
    """The number of weights, tied ones once, without the scales (`weight_scale`, ...) that quantization adds beside them."""
    named = ((name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters())
    return sum(parameter.numel() for name, parameter in named if not name.startswith("weight_"))


def preference_measures(
    model: PreTrainedModel, pairs: Sequence[tuple[ScoredRow, ScoredRow]], batch_size: int
) -> dict[str, float]:
    """How often the model gives the chosen answer the higher log-probability, as a sum and per token; ties count half."""
    import torch

    from stages.lib.perplexity import score_rows
    from stages.lib.preferences import wins

    scores = score_rows(model, [row for pair in pairs for row in pair], batch_size)
    sums_N2 = -torch.tensor([each.nats for each in scores], dtype=torch.float64).view(-1, 2)
    tokens_N2 = torch.tensor([each.tokens for each in scores], dtype=torch.float64).view(-1, 2)
    means_N2 = sums_N2 / tokens_N2
    return {
        "heldout_preference_accuracy": float(wins(*sums_N2.unbind(1)).mean()),
        "heldout_preference_accuracy_per_token": float(wins(*means_N2.unbind(1)).mean()),
        "heldout_preference_margin_per_token": float((means_N2[:, 0] - means_N2[:, 1]).mean()),
    }


def write_reply(
    ctx: Context,
    params: EvaluateParams,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: Mapping[str, Any],
) -> dict[str, Any]:
    """The model's reply to prompt number `index`. All models draw with the same seed."""
    from stages.lib.generation import stream_reply, whole_reply

    assert params.generation is not None
    stream = stream_reply(
        model,
        tokenizer,
        prompt["prompt"],
        max_new_tokens=params.generation.max_new_tokens,
        temperature=params.generation.temperature,
        top_p=params.generation.top_p,
        seed=ctx.seed + index,
    )
    reply = whole_reply(stream)
    return {"text": reply.text, "tokens": reply.num_tokens, "truncated": reply.truncated}


def judge(ctx: Context, subject: Subject) -> dict[str, Any]:
    """The measures of one reward model."""
    import torch

    from stages.lib.distributed import device_type
    from stages.lib.perplexity import reward_rows
    from stages.lib.preferences import wins
    from stages.lib.reward_models import load_reward_model

    model, tokenizer = load_reward_model(subject.folder, device_type(ctx.resources))
    rows = [row for pair in subject.pairs for row in pair]
    values = reward_rows(model, rows, ctx.resources.micro_batch_size or 8, tokenizer.pad_token_id)
    scores_N2 = torch.tensor(values, dtype=torch.float64).view(-1, 2)
    measures = {
        "heldout_reward_accuracy": float(wins(*scores_N2.unbind(1)).mean()),
        "heldout_reward_margin": float((scores_N2[:, 0] - scores_N2[:, 1]).mean()),
    }
    facts = {"parameters": num_weights(model), "vocabulary": len(tokenizer)}
    return {"measures": measures, "facts": facts, "replies": []}


def flatten(everyone: Sequence[Subject]) -> dict[str, float]:
    """`measure.model` -> number, the same measure of all models next to each other."""
    measures = dict.fromkeys(measure for each in everyone for measure in each.results["measures"])
    return {
        f"{measure}.{each.name}": each.results["measures"][measure]
        for measure in measures
        for each in everyone
        if measure in each.results["measures"]
    }


def write_report(
    ctx: Context,
    subjects: Sequence[Subject],
    judges: Sequence[Subject],
    rows: Rows,
    prompts: Sequence[Mapping[str, Any]],
) -> None:
    """`report.json` with all numbers, `report.md` for reading, `generations.jsonl` with one line per prompt."""
    from stages.lib.report import report_markdown
    from stages.lib.rows import write_rows

    report = {
        "models": {each.name: describe(each) for each in subjects},
        "reward_models": {each.name: describe(each) for each in judges},
        "rows": rows.describe(),
        "baselines": rows.baselines,
        "notes": comparison_notes(subjects, rows),
    }
    generations = [
        {**prompt, "replies": {subject.name: subject.results["replies"][index] for subject in subjects}}
        for index, prompt in enumerate(prompts)
    ]
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (ctx.out / "report.json").write_text(text + "\n", encoding="utf-8")
    (ctx.out / "report.md").write_text(report_markdown(report, generations), encoding="utf-8")
    write_rows(ctx.out / "generations.jsonl", generations)


def describe(subject: Subject) -> dict[str, Any]:
    """What the model is, and what was measured."""
    manifest = read_manifest(subject.folder) if (subject.folder / MANIFEST).exists() else None
    return {
        "artifact_id": manifest.artifact_id if manifest else None,
        "stage": manifest.stage if manifest else None,
        "dtype": manifest.facts.dtype if manifest else None,
        "bytes": sum(path.stat().st_size for path in subject.folder.glob("*.safetensors")),
        "tokenizer_digest": subject.tokenizer_digest,
        "chat_template_digest": subject.template_digest,
        **subject.results["facts"],
        "measures": subject.results["measures"],
    }


def comparison_notes(subjects: Sequence[Subject], rows: Rows) -> list[str]:
    """Which columns compare with which, and what was left out."""
    notes = []
    for what, measure, key in (
        ("tokenizers", "Perplexity and nats per token compare", "tokenizer_digest"),
        ("chat templates", "Measures of chats and preferences compare", "template_digest"),
    ):
        groups: dict[Any, list[str]] = {}
        for subject in subjects:
            groups.setdefault(getattr(subject, key), []).append(subject.name)
        if len(groups) > 1:
            listed = "; ".join(", ".join(names) for names in groups.values())
            notes.append(f"The models have {len(groups)} different {what}: {measure} only within {listed}.")
            if key == "tokenizer_digest":
                notes.append("Bits per byte compare between all of them, because all read the same text.")
    for left_out, what in ((rows.chats_left_out, "chats"), (rows.pairs_left_out, "pairs")):
        if left_out:
            notes.append(
                f"{left_out} held-out {what} were left out for all models, because one of them cannot use them."
            )
    return notes
