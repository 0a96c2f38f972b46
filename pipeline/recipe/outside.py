"""Model and tokenizer folders that no recipe of ours made: what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, shown
from pipeline.recipe.weight_files import OTHERS, broken_weights, embedded_otherwise, unscaled, weights_in
from pipeline.settings.paths import holds_file, is_file, read_json
from pipeline.stage import Stage
from pipeline.store.artifact import REWARD_READING, Kind

SIZES = frozenset(
    "vocab_size hidden_size n_embd dim intermediate_size num_hidden_layers n_layer n_layers num_attention_heads n_head "
    "n_heads max_position_embeddings n_positions pad_token_id".split()
)
"""Fields of a config that a plan reckons with."""


ADAPTER = "adapter_config.json"


READABLE_QUANTIZATION = "compressed-tensors"


SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "sentencepiece.model", "spm.model")
"""What a tokenizer is called that has no tokenizer.json."""


def is_an_adapter(path: Path) -> str:
    """That a folder holds a peft adapter alone, and how to make a model of it."""
    config = read_json(path / ADAPTER)
    base = config.get("base_model_name_or_path")
    if config.get("num_virtual_tokens"):
        return (
            f"It is an adapter of virtual tokens for {shown(base)}, of which no model can be made. Name that model here, and the "
            "adapter beside it where a stage takes one: `evaluate` does (`inputs.adapters`), and `slipway chat MODEL --adapter`."
        )
    # A recipe looks a path up from its own folder, peft from the one that it was run in: so the whole path is said.
    model = Path(base).resolve() if isinstance(base, str) and holds_file(Path(base), "config.json") else "FOLDER"
    return (
        f"It is an adapter for {shown(base)}, and no model. Merge the two in a stage of its own, and name that stage "
        f"here: `merged: {{kind: merge, inputs: {{model: {model}, adapter: {path}}}}}`."
    )


def an_adapter_beside(path: Path) -> str:
    """That transformers would put an adapter on a model without a word, because it lies beside it."""
    return (
        f"{path} holds a model, and an adapter beside it ({ADAPTER}) that would be put on it without a word. Move "
        f"{ADAPTER} and adapter_model.safetensors to a folder of their own; to have the two as one model, name both in a "
        f"stage: `merged: {{kind: merge, inputs: {{model: {path}, adapter: FOLDER}}}}`."
    )


def weights_problem(path: Path) -> str | None:
    """Why no weights can be read from a model's folder; None if they can, as far as the heads of its files show."""
    if weights_in(path):
        beside = an_adapter_beside(path) if is_file(path / ADAPTER) else None
        return broken_weights(path) or embedded_otherwise(path) or unscaled(path) or beside
    others = sorted(file.name for pattern in OTHERS for file in path.glob(pattern))
    if not any(name.startswith("pytorch_model") for name in others):
        there = f" (there is {', '.join(others[:3])})" if others else ""
        return f"{path} holds a config.json and no weights in *.safetensors{there}. Get the whole folder."
    name = (read_json(path / "config.json").get("architectures") or ["AutoModel"])[0]
    return (
        f"{path} holds its weights as pytorch_model.bin, which may run code when it is opened. Write them anew: "
        f"`from transformers import {name} as M; M.from_pretrained({str(path)!r}).save_pretrained(FOLDER)`, and copy "
        "the tokenizer's files there."
    )


def is_quantized(path: Path) -> str:
    """How to make a model that can be trained of a quantized one whose numbers transformers unpacks."""
    return (
        "Its weights are quantized: name the model that it was made from, or unpack them: `from transformers import "
        "AutoModelForCausalLM as M, CompressedTensorsConfig as C; "
        f"m = M.from_pretrained({str(path)!r}, quantization_config=C(dequantize=True)); "
        "m.save_pretrained(FOLDER, state_dict={k: v for k, v in m.state_dict().items() "
        "if not k.rpartition('.')[2].startswith('weight_')})`, and copy the tokenizer's files there."
    )


def way_out(path: Path, kind: Kind) -> str | None:
    """How to make a causal model of a folder that holds none, where that can be said."""
    ways = {Kind.ADAPTER: is_an_adapter, Kind.QUANTIZED_LM: is_quantized}
    return ways[kind](path) if kind in ways else None


def whole_model(given: str, kind: Kind) -> str | None:
    """How to make a whole model of an adapter that a step makes (`given` says: 'step' makes); None of other kinds."""
    if kind is not Kind.ADAPTER:
        return None
    step = given.split("'")[1]
    return (
        f"Set `publish: merged` in the adapter block of {step}, or merge it in a stage of its own and name that here: "
        f"`merged: {{kind: merge, inputs: {{model: THE MODEL OF {step}, adapter: {step}}}}}`. Of virtual tokens "
        "(prompt_tuning, prefix_tuning, p_tuning) no model can be made."
    )


def how_to_give(kind: Kind, stage: Stage, role: str, path: Path | None, given: str) -> str | None:
    """How the stage takes what one of its inputs does not take, where that can be said. `path`: of a folder; None of a step."""
    ways = [way_out(path, kind) if path else whole_model(given, kind), place_for_adapters(stage, role, kind)]
    return " ".join(way for way in ways if way) or None


def place_for_adapters(stage: Stage, given: str, kind: Kind) -> str | None:
    """Which input of the stage takes an adapter, if it is given as another one; None of other kinds, or where none does."""
    role, _, name = given.partition(".")
    roles = [role for role, declared in stage.inputs.items() if kind in declared.kinds]
    if kind is not Kind.ADAPTER or not roles or role == roles[0]:
        return None
    here = f"{roles[0]}.{name}" if name and stage.inputs[roles[0]].many else roles[0]
    return f"Or name the adapter as inputs.{here}, and beside it the model that it was trained on."


def quantization_problem(config: Path, block: Mapping[str, Any]) -> str | None:
    """Why weights that a config says are quantized cannot be read; None if they can."""
    said = block["quantization_config"]
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if method == READABLE_QUANTIZATION:
        return None
    return (
        f"{config} says that the weights are quantized ({shown(method)}), which no stage reads but as "
        f"{READABLE_QUANTIZATION}. Name the model that it was made from."
    )


def tokenizer_problem(path: Path) -> str | None:
    """Why the tokenizer of a folder would be opened as another one, as far as its JSON files show; None if they do not."""
    files = [path / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not all(map(is_file, files)):
        return None
    model_type = read_json(path / "config.json").get("model_type") if is_file(path / "config.json") else None
    declared = read_json(files[1]).get("tokenizer_class")
    if declared not in ("LlamaTokenizer", "LlamaTokenizerFast") or model_type not in (None, "llama"):
        return None
    if "'ByteLevel'" not in str(read_json(files[0]).get("pre_tokenizer")):
        return None
    return (
        f"{files[1]} names {declared}, which splits text at spaces of its own, and the tokenizer.json beside it is of "
        'bytes: all spaces and line breaks would be lost. Write "tokenizer_class": "PreTrainedTokenizerFast" there: '
        "then the file is opened as it is."
    )


def kind_of_folder(path: Path) -> Kind:
    """What a model or tokenizer folder that is no artifact of ours holds, read from its config.json.

    Raises `RecipeError` where that cannot be told, `PathError` where config.json cannot be read.
    """
    config = path / "config.json"
    if is_file(path / ADAPTER) and not weights_in(path):
        return Kind.ADAPTER
    if not is_file(config):
        if any(is_file(path / name) for name in ("tokenizer.json", *SENTENCEPIECE)):
            return Kind.TOKENIZER
        raise RecipeError(
            f"{path} is no artifact, model or tokenizer folder. It has neither manifest.json nor config.json."
        )
    block = read_json(config)
    for name in SIZES & block.keys():
        if block[name] is not None and type(block[name]) is not int:
            raise RecipeError(
                f"{config} has {shown(block[name])} as `{name}`, which is a whole number. Save the model again."
            )
    architectures = block.get("architectures") or []
    if not isinstance(architectures, list):
        raise RecipeError(
            f"{config} has {shown(architectures)} as `architectures`, which is a list. Save the model again."
        )
    if not architectures or not architectures[0]:
        raise RecipeError(
            f"{config} does not say in `architectures` which model it is of. Save the model again, with the class that it"
            " was made with: its `save_pretrained` says so."
        )
    architecture = str(architectures[0])
    if block.get("quantization_config") is not None:
        if problem := quantization_problem(config, block):
            raise RecipeError(problem)
        return Kind.QUANTIZED_LM
    endings = {
        "ForCausalLM": Kind.CAUSAL_LM,
        "LMHeadModel": Kind.CAUSAL_LM,
        "ForMaskedLM": Kind.ENCODER,
        "ForPreTraining": Kind.ENCODER,
        "ForTokenClassification": Kind.EXTRACTOR,
        "ForQuestionAnswering": Kind.READER,
    }
    if block.get(REWARD_READING) is not None:
        endings |= {"ForSequenceClassification": Kind.REWARD_MODEL, "ForTokenClassification": Kind.PROCESS_REWARD_MODEL}
    for ending, kind in endings.items():
        if architecture.endswith(ending):
            return kind
    if architecture.endswith("ForSequenceClassification"):
        labels = block.get("id2label")
        one_score = (isinstance(labels, dict) and len(labels) == 1) or block.get("num_labels") == 1
        return Kind.REWARD_MODEL if one_score else Kind.CLASSIFIER
    if architecture.endswith("Model"):
        return Kind.ENCODER
    raise RecipeError(f"{config} names the architecture {shown(architecture)}, which no stage reads.")
