"""Where training on packed tokens starts: new models from a recipe's block `architecture`, or a model that is there.

The block is a flat transformers config with its `model_type`. The vocabulary's size and the special tokens are filled in
from the tokenizer. What `plan` asks is answered without torch or transformers for the families of `arithmetic.FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, RecipeError, did_you_mean, shown
from pipeline.stage import Context, Estimate, Forecast
from stages.lib.models.arithmetic import FAMILIES, SAME_FIELDS, completed, field_of, odd_fields
from stages.lib.models.lengths import length_problems

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


WHERE = "params.architecture"


USUAL_MULTIPLE = 64
"""Numbers of embeddings are padded to a multiple of this, because kernels like it."""


TOKENIZER_DECIDES = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def grown_rows(rows: int, needed: int, multiple: int | None) -> int:
    """How many tokens a model embeds that embeds `rows` and needs `needed`: at least that, in a multiple of `multiple`.

    None: of the largest power of two, up to `USUAL_MULTIPLE`, that divides `rows`: who padded them once wanted that.
    """
    return rows if needed <= rows else rounded_up(needed, multiple or math.gcd(rows, USUAL_MULTIPLE))


def planned_architecture(
    block: Mapping[str, Any], vocabulary_size: int | None, vocabulary_multiple: int = 1
) -> Mapping[str, Any]:
    """The block with its family's defaults, and the number of embeddings if the vocabulary is known."""
    size = vocabulary_size and rounded_up(vocabulary_size, vocabulary_multiple)
    return completed({**block, **({"vocab_size": size} if size else {})}) or block


def architecture_problems(
    block: Mapping[str, Any], tokens: Estimate, *, causal: bool = True, vocabulary_multiple: int = 1
) -> list[Problem]:
    """What is wrong with the block for training on `tokens`; of a family that is not known here, what transformers knows."""
    if not isinstance(block.get("model_type"), str):
        return [Problem(f"{WHERE}.model_type", "is required", f"For example one of {', '.join(FAMILIES)}.")]
    problems = [
        Problem(f"{WHERE}.{name}", "is taken from the tokenizer", "Remove it.")
        for name in TOKENIZER_DECIDES
        if name in block
    ]
    if tokens.vocabulary_size:
        size = rounded_up(tokens.vocabulary_size, vocabulary_multiple)
        if block.get("vocab_size") not in (None, size):
            problems.append(
                Problem(f"{WHERE}.vocab_size", f"is {block['vocab_size']}, and the tokens need {size}", "Leave it out.")
            )
    config = completed(block)
    if config is None:
        return problems + unlisted_problems(block)
    family = FAMILIES[config["model_type"]]
    names = family.fields | {usual for usual, own in SAME_FIELDS.items() if family.fields & set(own)}
    problems += [
        Problem(f"{WHERE}.{name}", f"is no field of {config['model_type']}", did_you_mean(name, sorted(names)))
        for name in block
        if name not in names | {"model_type"}
    ]
    if family.causal != causal:
        made, wanted = ("causal", "masked") if family.causal else ("masked", "causal")
        problems.append(
            Problem(
                f"{WHERE}.model_type",
                f"is {config['model_type']}, which is made for the {made} objective, not for the {wanted} one",
                f"Choose one of {', '.join(name for name, each in FAMILIES.items() if each.causal == causal)}.",
            )
        )
    odd = odd_fields(block)
    if odd:
        wrong = [Problem(f"{WHERE}.{name}", f"must be {what}, not {shown(config[name])}") for name, what in odd.items()]
        return [*problems, *wrong]
    hidden, heads = field_of(block, "hidden_size"), field_of(block, "num_attention_heads")
    sizes_known = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    if sizes_known and hidden % heads and not config.get("head_dim"):
        problems.append(Problem(f"{WHERE}.hidden_size", f"{hidden} is not a multiple of {heads} attention heads"))
    return problems + block_length_problems(block, tokens.sequence_length)


def unlisted_problems(block: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the block of a family that only transformers knows. Imports it, which takes seconds."""
    from dataclasses import fields

    from transformers import CONFIG_MAPPING

    model_type = block["model_type"]
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, sorted(CONFIG_MAPPING.keys()))
        return [Problem(f"{WHERE}.model_type", f"there is no {model_type!r} in transformers", hint)]
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in fields(config_class)} | set(getattr(config_class, "attribute_map", {}))
    return [
        Problem(f"{WHERE}.{name}", f"is no field of {model_type}", did_you_mean(name, sorted(names)))
        for name in block
        if name not in names | {"model_type"}
    ]


def block_length_problems(config: Mapping[str, Any], sequence_length: int | None) -> list[Problem]:
    """What is wrong if the blocks to train on are longer than a model of this config takes."""
    where, hint = f"{WHERE}.max_position_embeddings", "Raise it by {above}."
    return length_problems(config, sequence_length, where=where, what="the blocks have {tokens} tokens", hint=hint)


def new_config(
    block: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    causal: bool = True,
    vocabulary_multiple: int = 1,
) -> PreTrainedConfig:
    """The transformers config of a new model. Raises `RecipeError` with everything that is wrong with its block."""
    from transformers import AutoConfig

    known = Estimate(vocabulary_size=len(tokenizer), sequence_length=sequence_length)
    problems = architecture_problems(block, known, causal=causal, vocabulary_multiple=vocabulary_multiple)
    problems += unlisted_problems(block) if not problems else []
    if problems:
        raise RecipeError(*problems)
    rest = dict(block)
    model_type = rest.pop("model_type")
    rest["vocab_size"] = rounded_up(len(tokenizer), vocabulary_multiple)
    try:
        config = AutoConfig.for_model(model_type, **rest, **special_tokens_of(tokenizer))
    except Exception as error:  # transformers checks fields in ways of its own, some of them no ValueErrors
        raise RecipeError(Problem(WHERE, str(error).replace("\n", " "), "Correct the fields.")) from error
    if problems := block_length_problems(config.to_dict(), sequence_length):
        raise RecipeError(*problems)
    return config


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids that a model's config holds. The embedding of a padding id is never trained, so no other token may be it."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None if pad in (bos, eos) else pad}


def build(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of `config`, its weights drawn at random. Raises `RecipeError` if `auto_class` has none for its type."""
    try:
        return auto_class.from_config(config)
    except ValueError as error:
        raise RecipeError(Problem(f"{WHERE}.model_type", str(error).splitlines()[0], "Choose another.")) from error


def starting_model(
    ctx: Context,
    role: str,
    block: Mapping[str, Any] | None,
    auto_class: Any,
    sequence_length: int,
    *,
    causal: bool = True,
    vocabulary_multiple: int = 1,
) -> tuple[Path, dict[str, Any]]:
    """The folder with the weights that training on the input `tokens` starts from, and the model's config.

    That is the input `role` where there is one, else a new model of the block, with the tokens' tokenizer beside it. Raises
    `ArtifactError` if the input has another tokenizer, and `RecipeError` if the block is wrong.
    """
    from stages.lib.models.config import read_config
    from stages.lib.models.loading import initial_weights
    from stages.lib.processes.collectives import from_main
    from stages.lib.text.tokenizers import copy_tokenizer, load_tokenizer, require_same_tokenizer

    tokens = ctx.inputs["tokens"]
    if role in ctx.inputs:
        require_same_tokenizer(ctx.inputs[role], tokens, f"inputs.{role}")
        return ctx.inputs[role], read_config(ctx.inputs[role])
    tokenizer = load_tokenizer(tokens)
    config = new_config(block or {}, tokenizer, sequence_length, causal=causal, vocabulary_multiple=vocabulary_multiple)
    described = config.to_dict()
    folder = initial_weights(ctx, lambda: build(auto_class, config))
    # Fails now, and not after training, if transformers opens another tokenizer beside this model's config.
    from_main(lambda: copy_tokenizer(tokens, folder))
    return folder, described


def starting_problems(
    block: Mapping[str, Any] | None, role: str, forecast: Forecast, *, causal: bool = True, vocabulary_multiple: int = 1
) -> list[Problem]:
    """What is wrong with where training on the input `tokens` starts: at the input `role`, or at a new model of the block."""
    tokens = forecast.inputs.get("tokens", Estimate())
    if block is None:
        if role in forecast.inputs:
            return []
        what = f"is required where the stage has no input {role}"
        return [Problem(WHERE, what, f"Give model_type and the sizes of the {role}.")]
    problems = architecture_problems(block, tokens, causal=causal, vocabulary_multiple=vocabulary_multiple)
    if role in forecast.inputs:
        what = f"has no effect where the stage has an input {role}"
        problems.insert(0, Problem(WHERE, what, "Remove one of them."))
    return problems


def vocabulary_problems(forecast: Forecast, role: str, other: str, hint: str) -> list[Problem]:
    """What is wrong if the inputs `role` and `other` cannot have the same tokenizer, as far as their sizes show."""
    one, two = (forecast.inputs.get(each, Estimate()).vocabulary_size for each in (role, other))
    if not one or not two or one == two:
        return []
    return [Problem(f"inputs.{role}", f"has a vocabulary of {one}, and the {other} one of {two}", hint)]
