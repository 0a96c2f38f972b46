"""The YAML at the top of a card, which the hub reads: written, and read from the cards of others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.cards.lineage import Lineage, Link
from pipeline.errors import PathError, RecipeError
from pipeline.settings.licenses import LICENSES, License, NamedLicense
from pipeline.settings.paths import holds_file, read_file
from pipeline.settings.yaml_loader import parse_yaml
from pipeline.store.artifact import Kind

CARD = "README.md"


MOST_CARD_BYTES = 4 << 20


FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[^\S\n]*\n(.*?\n)---[^\S\n]*(?:\n|\Z)", re.DOTALL)


PIPELINE_TAGS = {
    Kind.CAUSAL_LM: "text-generation",
    Kind.QUANTIZED_LM: "text-generation",
    Kind.ENCODER: "fill-mask",
    Kind.REWARD_MODEL: "text-classification",
    Kind.PROCESS_REWARD_MODEL: "token-classification",
    Kind.CLASSIFIER: "text-classification",
    Kind.EXTRACTOR: "token-classification",
    Kind.READER: "question-answering",
}
"""Kind of a model -> what the hub calls its task. What stands here gets a card."""


TAGS = {
    Kind.QUANTIZED_LM: ("compressed-tensors",),
    Kind.REWARD_MODEL: ("reward-model",),
    Kind.PROCESS_REWARD_MODEL: ("reward-model", "process-reward-model"),
}


def front_matter(metadata: Mapping[str, Any]) -> str:
    """The lines at the top of a card, without what is None or empty."""
    said = {name: value for name, value in metadata.items() if value not in (None, [], {})}
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def metadata_of(lineage: Lineage) -> dict[str, Any]:
    """What a model's card tells the hub. A base is named only where it is a repository: the nearest one on the way back."""
    own = lineage.own
    assert own.kind is not None
    return {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS[own.kind],
        **origin_of(lineage, "quantized" if own.kind is Kind.QUANTIZED_LM else "finetune"),
        "tags": ["slipway", str(own.stage), *TAGS.get(own.kind, ())],
    }


def origin_of(lineage: Lineage, relation: str) -> dict[str, Any]:
    """Licence, base and data sets, as far as they are known."""
    return {**license_of(lineage), **base_model_of(lineage, relation), "datasets": datasets_of(lineage)}


def base_model_of(lineage: Lineage, relation: str) -> dict[str, str]:
    """The repository that the model goes back to, and how it relates to that. A quantization of a finetune, or an adapter
    on one, is no quantization of, or adapter on, the repository: there the relation is left open.
    """
    *steps, last = lineage.base_chain()
    if not last.repository:
        return {}
    known = len(steps) == 1 or relation == "finetune"
    return {"base_model": last.repository[0], **({"base_model_relation": relation} if known else {})}


def license_of(lineage: Lineage) -> dict[str, str]:
    """The licence that the recipe gives, else the one that the card of the base names; {} if neither does."""
    if given := lineage.own.params.get("license"):
        try:
            return TypeAdapter(License).validate_python(given).metadata()
        except ValidationError:
            return {}
    base = lineage.base()
    return license_in(read_metadata(base.folder), base) if base is not None and base.folder else {}


def license_in(metadata: Mapping[str, Any], base: Link) -> dict[str, str]:
    """The licence of another card, if the hub would take it from ours."""
    name = metadata.get("license")
    if isinstance(name, str) and name in LICENSES:
        return {"license": name}
    own_name, link = metadata.get("license_name"), metadata.get("license_link")
    if name != "other" or not isinstance(own_name, str) or not isinstance(link, str):
        return {}
    if base.repository and re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*", link):
        # The name of a file in that repository.
        repository, revision = base.repository
        link = f"https://huggingface.co/{repository}/blob/{revision}/{link}"
    try:
        return NamedLicense(name=own_name.lower(), link=link).metadata()
    except ValidationError:
        return {}


def read_metadata(folder: Path) -> dict[str, Any]:
    """What the card in `folder` tells the hub; {} if there is none, or it cannot be read."""
    if not holds_file(folder, CARD):
        return {}
    try:
        text = read_file(folder / CARD, MOST_CARD_BYTES).decode("utf-8", "replace")
        found = FRONT_MATTER.match(text)
        block, _ = parse_yaml(found[1], CARD) if found else ({}, [])
    except (PathError, RecipeError):
        return {}
    return block if isinstance(block, dict) else {}


def datasets_of(lineage: Lineage) -> list[str]:
    """The data sets of the hub among the sources, sorted."""
    found = {name for link in lineage.links.values() for name in hub_datasets(link.params)}
    return sorted(found)


def hub_datasets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if value.get("kind") == "hub" and isinstance(value.get("dataset"), str):
            yield value["dataset"]
        for each in value.values():
            yield from hub_datasets(each)
