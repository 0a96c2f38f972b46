"""A sequence classifier for every causal family: transformers has one for half of them."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification


def has_classifier(folder: Path) -> bool:
    """Whether plain transformers has a sequence classifier for the model in `folder`."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return known is not None and known.__module__ != __name__


def provide_classifier(folder: Path) -> None:
    """Makes `AutoModelForSequenceClassification` know the family of the model in `folder`, if it does not.

    The class is that of transformers for Llama and its like: the family's body under a linear layer without bias, read at
    the last token that is no padding. Does nothing for a family without causal model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    body = next(
        each for each in causal.__mro__ if each.__name__.endswith("PreTrainedModel") and each is not PreTrainedModel
    )
    name = f"{body.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    parts = {"__module__": __name__, "base_model_prefix": causal.base_model_prefix}
    AutoModelForSequenceClassification.register(kind, type(name, (GenericForSequenceClassification, body), parts))
