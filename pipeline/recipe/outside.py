"""Model and tokenizer folders that no recipe of ours made: what they hold."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.store.artifact import Kind


def kind_of_folder(path: Path) -> Kind:
    """What a model or tokenizer folder that is no artifact of ours holds, read from its config.json.

    Raises `RecipeError` where that cannot be told.
    """
    config = path / "config.json"
    if not config.is_file():
        if (path / "tokenizer.json").is_file():
            return Kind.TOKENIZER
        raise RecipeError(
            f"{path} is no artifact, model or tokenizer folder. It has neither manifest.json nor config.json."
        )
    try:
        block = json.loads(config.read_bytes())
        architecture = str((block.get("architectures") or [""])[0])
    except (ValueError, AttributeError):
        raise RecipeError(f"{config} is not JSON. Save the model again.") from None
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
        one_score = len(block.get("id2label") or {}) == 1 or block.get("num_labels") == 1
        return Kind.REWARD_MODEL if one_score else Kind.CLASSIFIER
    if architecture.endswith("Model"):
        return Kind.ENCODER
    raise RecipeError(f"{config} names the architecture '{architecture}', which no stage reads.")
