"""Model and tokenizer folders that no recipe of ours made: what they hold."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RecipeError, shown
from pipeline.settings.paths import is_file, read_json
from pipeline.store.artifact import Kind

SIZES = frozenset(
    "vocab_size hidden_size n_embd dim intermediate_size num_hidden_layers n_layer n_layers num_attention_heads n_head "
    "n_heads max_position_embeddings n_positions pad_token_id".split()
)
"""Fields of a config that a plan reckons with."""


def kind_of_folder(path: Path) -> Kind:
    """What a model or tokenizer folder that is no artifact of ours holds, read from its config.json.

    Raises `RecipeError` where that cannot be told, `PathError` where config.json cannot be read.
    """
    config = path / "config.json"
    if not is_file(config):
        if is_file(path / "tokenizer.json"):
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
    architectures = block.get("architectures") or [""]
    if not isinstance(architectures, list):
        raise RecipeError(
            f"{config} has {shown(architectures)} as `architectures`, which is a list. Save the model again."
        )
    architecture = str(architectures[0])
    if "quantization_config" in block:
        return Kind.QUANTIZED_LM
    endings = {
        "ForCausalLM": Kind.CAUSAL_LM,
        "LMHeadModel": Kind.CAUSAL_LM,
        "ForMaskedLM": Kind.ENCODER,
        "ForPreTraining": Kind.ENCODER,
        "ForTokenClassification": Kind.EXTRACTOR,
        "ForQuestionAnswering": Kind.READER,
    }
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
