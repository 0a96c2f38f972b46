"""A sequence classifier for every causal family: transformers has one for half of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification


def classifier_class(folder: Path) -> Any:
    """What opens the model in `folder` as a sequence classifier: transformers' own class, or one like that of Llama.

    Without a causal model of its family there is none to be like: transformers then says that it knows no such class.
    """
    kind = type(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForSequenceClassification
    return generic_classifier(kind)


@cache
def generic_classifier(config_class: Any) -> Any:
    """The family's body under a linear layer without bias, read at the last token that is no padding."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    body = next(
        each for each in causal.__mro__ if each.__name__.endswith("PreTrainedModel") and each is not PreTrainedModel
    )
    name = f"{body.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    parts = {"__module__": __name__, "base_model_prefix": causal.base_model_prefix}
    return type(name, (GenericForSequenceClassification, body), parts)
