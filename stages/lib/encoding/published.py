"""A classifier, extractor or reader on disk, ours or another maker's, as it was published: nothing about it is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.store.artifact import MANIFEST, Manifest, read_manifest
from stages.lib.encoding.label_names import label_names, span_tags
from stages.lib.models.config import read_config
from stages.lib.models.lengths import longest_text, require_length
from stages.lib.text.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Published:
    """The model in `folder`."""

    folder: Path

    @cached_property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def manifest(self) -> Manifest | None:
        """What is known of it where it is an artifact of ours."""
        return read_manifest(self.folder) if (self.folder / MANIFEST).exists() else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, which puts around texts what it puts there."""
        tokenizer = load_tokenizer(self.folder)
        tokenizer.padding_side = "right"
        return tokenizer

    @property
    def architecture(self) -> str:
        return str((read_config(self.folder).get("architectures") or [""])[0])

    @property
    def takes_pairs(self) -> bool | None:
        """Whether it was trained on pairs of texts; None where nobody says."""
        return self.manifest.facts.takes_pairs if self.manifest else None

    def trained_with(self, name: str, otherwise: Any) -> Any:
        """A param of the stage that trained it, or `otherwise` where it is no artifact of ours."""
        return self.manifest.params.get(name, otherwise) if self.manifest else otherwise

    def length(self, wanted: int | None) -> int:
        """Tokens that it is given at once: `wanted`, or as many as in training, or as it takes.

        Raises `DataError` if it takes fewer, or nothing says how many.
        """
        config = read_config(self.folder)
        trained = self.manifest.facts.max_length_tokens if self.manifest else None
        length = wanted or trained or longest_text(config)
        if length is None:
            raise DataError(Problem("params.max_length_tokens", "is null, and the model sets no limit", "Give it."))
        require_length(config, length)
        return length

    def labels(self) -> list[str]:
        """What its outputs are called, by number, as `label_names` says."""
        return label_names(self.config.to_dict(), str(self.folder))

    def spans(self) -> tuple[list[str], list[int | None]]:
        """Its labels and tags, as `span_tags` says."""
        return span_tags(self.config.to_dict(), str(self.folder))


def renamed(labels: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """What rows call each of the labels. Raises `DataError` if `names` has one that there is not."""
    if unknown := [name for name in names if name not in labels]:
        raise DataError(
            *(
                Problem(f"params.labels.{name}", "is no label of the model", did_you_mean(name, labels))
                for name in unknown
            )
        )
    return [names.get(label, label) for label in labels]


def require_known(wanted: Mapping[str, int], names: Sequence[str], may_be_unknown: bool) -> None:
    """Raises `DataError` if rows have labels (label -> how often) that the model cannot find, unless these may be counted."""
    unknown = {label: count for label, count in wanted.items() if label not in names}
    if not unknown or may_be_unknown:
        return
    listed = ", ".join(
        f"{label!r} ({count:,})" for label, count in sorted(unknown.items(), key=lambda each: -each[1])[:10]
    )
    more = f" and {len(unknown) - 10:,} more" if len(unknown) > 10 else ""
    what = f"have labels that the model does not know: {listed}{more}; it knows {', '.join(map(repr, sorted(set(names))[:10]))}"
    hint = "Say in `labels` what rows call the model's labels, or set `unknown_labels: count`: then these count as never found."
    raise DataError(Problem("inputs.rows", what, hint))
