"""Models that gain embeddings, for tokens that their vocabulary has gained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, Problem
from pipeline.stage import Context
from stages.lib.models.architectures import grown_rows
from stages.lib.models.loading import initial_weights, load_model
from stages.lib.processes.collectives import from_main
from stages.lib.text.tokenizers import chat_template_digest, load_tokenizer, same_rules


@dataclass(frozen=True)
class Grown:
    """A model that embeds all tokens of its tokenizer, which lies beside it."""

    folder: Path
    rows_before: int
    rows: int


def with_embeddings(
    ctx: Context, source: Path, tokenizer: PreTrainedTokenizerBase, old_ids: Collection[int], multiple: int | None
) -> Grown | None:
    """The causal model in `source` with embeddings for each id of `tokenizer`; None if its own are enough and all old.

    What is new is the mean of the embeddings of `old_ids`, so that at first each new token is as likely as the average one
    (Hewitt, 2021). All processes call it; it is done once, and survives a restart. Raises `ArtifactError` if the model has
    no embeddings that can grow, or the tokenizer cannot be kept.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    rows = int(config.get_text_config().vocab_size)
    ids = set(tokenizer.get_vocab().values())
    needed = max(ids) + 1
    if needed <= rows and ids <= set(old_ids):
        return None
    grown = grown_rows(rows, needed, multiple)

    def build() -> PreTrainedModel:
        model = load_model(AutoModelForCausalLM, source)
        grow_embeddings(model, sorted(each for each in old_ids if each < rows), sorted(ids - set(old_ids)), grown)
        return model

    folder = initial_weights(ctx, build)
    from_main(lambda: keep_tokenizer(tokenizer, folder))
    return Grown(folder, rows, grown)


def grow_embeddings(model: PreTrainedModel, old_ids: Sequence[int], new_ids: Sequence[int], num_rows: int) -> None:
    """Has the model embed `num_rows` tokens, where it reads them and where it predicts them, tied or not.

    The rows of `new_ids`, and all that come in addition, become the mean of the rows of `old_ids`. Raises `ArtifactError`
    for a model whose embeddings are not of such a kind.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if num_rows != rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    if wrong := [name for name, tensor in by_token(model) if tensor.shape[0] != num_rows]:
        what = f"{type(model).__name__} keeps {', '.join(wrong)} as it is when its embeddings grow"
        raise ArtifactError(Problem("params.add_tokens", what, "Choose a template whose tokens the vocabulary has."))
    fresh = sorted({*new_ids, *range(rows, num_rows)})
    with torch.no_grad():
        for _, tensor in by_token(model):
            tensor[fresh] = tensor[list(old_ids)].mean(dim=0, dtype=torch.float64).to(tensor.dtype)


def by_token(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what the model holds one row of for each token: its input embeddings, and its head."""
    yield "the input embeddings", model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    if head is not None:
        yield "the output embeddings", head.weight
        if isinstance(getattr(head, "bias", None), nn.Parameter):
            yield "the output bias", head.bias


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer beside the model in `folder`, from where it will be published. Raises `ArtifactError` if it would
    not be opened there as what it is: that must not first be seen after training.
    """
    tokenizer.save_pretrained(folder)
    opened = load_tokenizer(folder)
    if not same_rules(tokenizer, opened) or chat_template_digest(tokenizer) != chat_template_digest(opened):
        what = f"with the added tokens the model's tokenizer would be opened as another one ({type(opened).__name__})"
        hint = 'Write "tokenizer_class": "PreTrainedTokenizerFast" in the tokenizer_config.json of the model\'s folder.'
        raise ArtifactError(Problem("params.add_tokens", what, hint))
