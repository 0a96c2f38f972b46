"""The stage `quantize`: a causal model with its linear layers in 8 or 4 bits, measured before and after."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.errors import ArtifactError, DataError, GateError, Problem, did_you_mean
from pipeline.stage import Context, Estimate, Forecast, Result, Stage, accepts
from pipeline.store.artifact import Facts, Kind
from pipeline.store.numbers import require_finite
from stages.lib.formulas.bounds import Weight
from stages.lib.models.columns import group_problems, is_ignored, planned_columns
from stages.lib.models.families import quantization_problems
from stages.lib.models.lengths import longest_text, require_length
from stages.lib.models.published import PublishedParams
from stages.lib.text.template_date import TemplateDateParams, on_template_date
from stages.lib.text.template_forecast import unembedded_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.lib.measuring.perplexity import ScoredRow
    from stages.lib.text.packed import PackedTokens, Split


class QuantizeParams(TemplateDateParams, PublishedParams):
    method: Literal["round_to_nearest", "gptq"] = "gptq"
    """round_to_nearest: each weight by itself; needs no calibration. gptq: column by column, spreading each one's
    rounding error over those not yet rounded, by second-order statistics of the layer's inputs (Frantar et al.,
    2023)."""
    bits: Literal[4, 8] = 4
    """Bits per weight of the quantized layers."""
    group_size: int | None = Field(default=128, ge=8)
    """Input columns of a layer that share one scale. It must divide the columns of every quantized layer. null: one
    scale per output channel."""
    symmetric: bool = True
    """Whether zero lies in the middle of the range. false: each group has an offset of its own, at a small cost in size
    and speed."""
    ignore: list[str] = ["lm_head"]
    """Linear layers that stay as they are: their full names, or `re:` and a regular expression that matches them from
    the start."""
    calibration_rows: int = Field(default=128, ge=1)
    """Training rows (blocks of tokens, or chats) from which gptq takes its statistics. Drawn with the seed of the
    step."""
    calibration_length_tokens: int | None = Field(default=None, ge=2)
    """Tokens of each of those rows that are used, at most. null: all that the model reads."""
    dampening: float = Field(default=0.01, ge=1e-6, le=1)
    """What gptq adds to the diagonal of its statistics, as a fraction of the diagonal's mean."""
    activation_order: bool = True
    """Whether gptq rounds the columns with the largest inputs first. It costs nothing when the model runs."""
    heldout_rows: int | None = Field(default=None, ge=1)
    """Held-out rows (blocks of tokens, or chats) on which perplexity is measured before and after: the first so many.
    null: all."""
    max_perplexity_increase: Weight | None = None
    """The most that held-out perplexity may rise, as a fraction (0.01 is one percent). Above it the stage fails and
    publishes nothing. null: no limit."""

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> QuantizeParams:
        """Compared with the defaults, because a job's params are written out in full."""
        if self.method == "round_to_nearest":
            for name in GPTQ_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect with method round_to_nearest: remove it, or take gptq")
        return self


GPTQ_ONLY = ("calibration_rows", "calibration_length_tokens", "dampening", "activation_order")

CALIBRATION_BATCH_ROWS = 8
"""Fixed, because it shows in the last bits of the statistics, and so in which way a weight in the middle is rounded."""


def estimate(forecast: Forecast) -> Estimate:
    source = forecast.inputs.get("model", Estimate())
    return Estimate(
        parameters=source.parameters,
        architecture=source.architecture,
        vocabulary_size=source.vocabulary_size,
        sequence_length=source.sequence_length,
    )


def check(forecast: Forecast) -> list[Problem]:
    """What the architecture alone shows: layers that cannot be quantized, or whose columns the group size does not divide."""
    params: QuantizeParams = forecast.params
    architecture = forecast.inputs.get("model", Estimate()).architecture or {}
    if problems := quantization_problems(architecture):
        return problems
    if architecture.get("model_type") in ("mamba", "falcon_mamba"):
        mixer = (f"backbone.layers.0.mixer.{name}" for name in ("dt_proj", "out_proj"))
        if not all(is_ignored(name, params.ignore) for name in mixer):
            what = "leaves layers dt_proj and out_proj to be quantized, which a Mamba can then not be read with again"
            hint = 'Write `ignore: ["lm_head", "re:.*dt_proj", "re:.*out_proj"]`.'
            return [Problem("params.ignore", what, hint)]
    problems = unembedded_problems(forecast)
    if params.group_size is None:
        return problems
    return problems + group_problems(planned_columns(architecture, params.ignore), params.group_size)


@on_template_date
def run(ctx: Context, params: QuantizeParams) -> Result:
    from stages.lib.measuring.perplexity import score
    from stages.lib.models.compressing import compress
    from stages.lib.models.config import read_config
    from stages.lib.models.loading import count_parameters, load_language_model
    from stages.lib.processes.joining import device_type, use_threads
    from stages.lib.text.tokenizers import copy_tokenizer, load_tokenizer

    use_threads(ctx.resources)
    device = device_type(ctx.resources)
    source = ctx.inputs["model"]
    config = read_config(source)
    if "quantization_config" in config:
        raise ArtifactError(Problem(str(source), "is quantized already", "Name the model that it was made from."))
    tokenizer = load_tokenizer(source)
    length = longest_text(config)
    rows = heldout_rows(ctx, params, tokenizer, length)

    model = load_language_model(source)
    check_layers(model, params)
    parameters = count_parameters(model)
    batch_size = ctx.resources.micro_batch_size or 8
    ctx.journal.note(f"measuring the original on {len(rows):,} held-out rows")
    original = score(model.to(device), rows, batch_size)
    model.to("cpu")

    batches = calibration_batches(ctx, params, tokenizer, length) if params.method == "gptq" else None
    ctx.journal.note(f"quantizing to {params.bits} bits with {params.method}")
    log = ctx.work / "llm-compressor.log"
    compress(model, tokenizer, lambda: modifier_of(params), batches, ctx.out, log)
    del model
    facts = copy_tokenizer(source, ctx.out)
    copy_generation_config(source, ctx.out)

    # What is measured is what will be published: read back from the disk, not what lies in memory.
    quantized = score(load_language_model(ctx.out, device), rows, batch_size)
    bytes_original, bytes_quantized = weight_bytes(source), weight_bytes(ctx.out)
    require_quality(original.perplexity, quantized.perplexity, params)
    metrics = {
        "heldout_perplexity": quantized.perplexity,
        "heldout_perplexity_original": original.perplexity,
        "heldout_perplexity_increase": quantized.perplexity / original.perplexity - 1,
        "bytes": float(bytes_quantized),
        "bytes_original": float(bytes_original),
        "compression_ratio": bytes_original / bytes_quantized,
    }
    facts |= {
        "vocabulary_size": config.get("vocab_size"),
        "max_length_tokens": length,
        "head_type": "causal_lm",
        "dtype": f"int{params.bits}",
        "parameters": parameters,
        "heldout_tokens": quantized.tokens,
    }
    return Result(metrics, Facts(**facts))


STAGE = Stage(
    kind="quantize",
    version=4,
    summary="a causal model in 8 or 4 bits per weight, with its perplexity before and after",
    params=QuantizeParams,
    inputs={"model": accepts(Kind.CAUSAL_LM), "calibration": accepts(Kind.TOKENS, Kind.CHATS)},
    output=Kind.QUANTIZED_LM,
    run=run,
    headline=("heldout_perplexity", "heldout_perplexity_original", "heldout_perplexity_increase", "compression_ratio"),
    estimate=estimate,
    check=check,
)


def check_layers(model: PreTrainedModel, params: QuantizeParams) -> None:
    """Raises `DataError` if a layer does not fit the group size, none is left to quantize, or `ignore` names none."""
    import torch

    columns = {
        name: module.in_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    problems = [
        Problem("params.ignore", f"{entry!r} is no linear layer of this model", did_you_mean(entry, sorted(columns)))
        for entry in params.ignore
        if not any(is_ignored(name, [entry]) for name in columns)
    ]
    left = {name: number for name, number in columns.items() if not is_ignored(name, params.ignore)}
    if not left:
        problems.append(Problem("params.ignore", "no linear layer is left to quantize", "Ignore fewer."))
    elif params.group_size is not None:
        problems += group_problems(left, params.group_size)
    if problems:
        raise DataError(*problems)


def heldout_rows(ctx: Context, params: QuantizeParams, tokenizer: Any, length: int | None) -> list[ScoredRow]:
    """What perplexity is measured on: blocks of held-out tokens, document by document, or held-out chats."""
    from itertools import islice

    from stages.lib.measuring.perplexity import document_pieces, scored_chat
    from stages.lib.rows.canonical import read_rows

    folder = ctx.inputs["calibration"]
    if holds_tokens(folder):
        packed = packed_tokens(ctx, "heldout")
        blocks = len(packed) if params.heldout_rows is None else min(params.heldout_rows, len(packed))
        rows = document_pieces(packed, blocks)
    else:
        chats = [row["messages"] for row in islice(read_rows(folder / "heldout.jsonl"), params.heldout_rows)]
        fitting = [scored_chat(tokenizer, messages, length or sys.maxsize) for messages in chats]
        rows = [row for of_chat in fitting for row in of_chat]
        if left_out := fitting.count([]):
            why = "longer than the model reads, or refused by its template"
            ctx.journal.note(f"left out {left_out} of {len(chats)} held-out chats: {why}")
    if not rows:
        raise DataError(
            Problem(str(folder), "has no held-out rows to measure perplexity on", "Keep some back in the mix.")
        )
    return rows


def calibration_batches(ctx: Context, params: QuantizeParams, tokenizer: Any, length: int | None) -> Any:
    """A loader of `params.calibration_rows` training rows, drawn with the seed of the step, as gptq's input."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from stages.lib.rows.canonical import read_rows
    from stages.lib.text.chat_spans import encode_chat

    folder = ctx.inputs["calibration"]
    packed = packed_tokens(ctx, "train") if holds_tokens(folder) else None
    chats = None if packed is not None else list(read_rows(folder / "train.jsonl"))
    num_rows = len(packed) if packed is not None else len(chats)
    if num_rows < params.calibration_rows:
        raise DataError(
            Problem(
                "params.calibration_rows",
                f"is {params.calibration_rows}, and the calibration input has {num_rows} training rows",
                f"Take at most {num_rows}.",
            )
        )
    generator = np.random.Generator(np.random.PCG64(ctx.seed))
    chosen = sorted(generator.choice(num_rows, params.calibration_rows, replace=False).tolist())
    limit = params.calibration_length_tokens

    def ids_and_positions(index: int) -> tuple[Any, Any]:
        if packed is not None:
            block = packed.block(index)
            return block.input_ids[:limit], block.position_ids[:limit]
        ids = encode_chat(tokenizer, chats[index]["messages"]).input_ids
        ids = ids[: min(each for each in (limit, length, len(ids)) if each is not None)]
        return np.asarray(ids), np.arange(len(ids))

    rows = [ids_and_positions(index) for index in chosen]
    # Blocks are all of one length and go together; chats go one by one, because padding would count as input.
    size = CALIBRATION_BATCH_ROWS if packed is not None else 1
    batches = [
        {
            "input_ids": torch.tensor(np.stack([ids for ids, _ in rows[start : start + size]])),
            # Positions that begin anew are what keeps the documents of a block apart.
            "position_ids": torch.tensor(np.stack([positions for _, positions in rows[start : start + size]])),
        }
        for start in range(0, len(rows), size)
    ]
    return DataLoader(batches, batch_size=None)


def holds_tokens(folder: Path) -> bool:
    return (folder / "tokens.json").exists()


def packed_tokens(ctx: Context, split: Split) -> PackedTokens:
    """Packed tokens that fit the model: of its own tokenizer, in blocks no longer than it reads."""
    from stages.lib.models.config import read_config
    from stages.lib.text.packed import PackedTokens
    from stages.lib.text.tokenizers import require_same_tokenizer

    folder, model = ctx.inputs["calibration"], ctx.inputs["model"]
    require_same_tokenizer(folder, model, "inputs.calibration")
    packed = PackedTokens(folder, split)
    require_length(
        read_config(model),
        packed.sequence_length,
        where="inputs.calibration",
        what="its blocks have {tokens} tokens",
        hint="Pack with a sequence_length that the model takes.",
    )
    return packed


def modifier_of(params: QuantizeParams) -> Any:
    """How llm-compressor quantizes the linear layers. Must be called where its log goes to a file."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from stages.lib.models.compressing import strict_gptq

    weights = {
        "num_bits": params.bits,
        "type": "int",
        "symmetric": params.symmetric,
        "strategy": "channel" if params.group_size is None else "group",
        "group_size": params.group_size,
    }
    groups = {"linear": {"targets": ["Linear"], "weights": weights}}
    if params.method == "round_to_nearest":
        return QuantizationModifier(config_groups=groups, ignore=params.ignore)
    order = "static" if params.activation_order else None
    return strict_gptq(config_groups=groups, ignore=params.ignore, dampening_frac=params.dampening, actorder=order)


def copy_generation_config(source: Path, out: Path) -> None:
    """The generation config as it was: it says where generation stops."""
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def require_quality(original: float, quantized: float, params: QuantizeParams) -> None:
    """Raises `GateError` if perplexity rose by more than the recipe allows, or is no number any more.

    Raises `DataError` if it was none before.
    """
    allowed = params.max_perplexity_increase
    require_finite({"held-out perplexity": original}, "inputs.model", "Look at this model's weights.")
    if not math.isfinite(quantized):
        raise GateError(
            Problem("params", f"the quantized model's held-out perplexity is {quantized}", "Nothing was published.")
        )
    increase = quantized / original - 1
    if allowed is not None and increase > allowed:
        raise GateError(
            Problem(
                "params.max_perplexity_increase",
                f"held-out perplexity rises from {original:.4f} to {quantized:.4f}, by {100 * increase:.3g}%, "
                f"and {100 * allowed:.3g}% is allowed",
                "Nothing was published. Take 8 bits, a smaller group_size, or more calibration_rows with method gptq.",
            )
        )
