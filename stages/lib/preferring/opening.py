"""What the stages that train on preferences begin and end with: the model's tokenizer and the rows, and what is told of both."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from pipeline.stage import Context
from pipeline.store.artifact import Facts
from stages.lib.models.adapters.folders import tokenizer_to_train_with
from stages.lib.models.config import read_config
from stages.lib.models.lengths import require_length
from stages.lib.preferring.pairs import Pairs, open_pairs
from stages.lib.preferring.params import PreferenceParams
from stages.lib.rows.ledger import Ledger
from stages.lib.text.chat_check import check_chat_template
from stages.lib.text.tokenizers import facts_of_tokenizer, load_tokenizer
from stages.lib.training.loop import Trained

Rows = TypeVar("Rows", bound=Sized)


@dataclass(frozen=True)
class Preferences(Generic[Rows]):
    """The input with the preferences in the tokens of the input `model`."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    heldout: Rows
    ledger: Ledger
    home: Path
    """The folder of the tokenizer."""

    def facts(self, params: PreferenceParams, trained: Trained, **known: Any) -> Facts:
        """What the consumers of the trained model check."""
        return Facts(
            **facts_of_tokenizer(self.tokenizer),
            dtype=trained.dtype,
            max_length_tokens=params.max_length_tokens,
            parameters=trained.parameters,
            train_rows=len(self.train),
            heldout_rows=len(self.heldout),
            dropped_rows=dict(self.ledger.dropped),
            optimizer_steps=trained.steps,
            **known,
        )


def open_preferences(ctx: Context, params: PreferenceParams, *, with_margins: bool = False) -> Preferences[Pairs]:
    """Raises `DataError` if pairs may be longer than the model takes, or its chat template is not fit for training."""
    tokenizer, home = tokenizer_of_policy(ctx, params.max_length_tokens)
    pairs = open_pairs(ctx, tokenizer, params.max_length_tokens, params.max_dropped_fraction, with_margins=with_margins)
    return Preferences(tokenizer, *pairs, home)


def tokenizer_of_policy(ctx: Context, max_length_tokens: int) -> tuple[PreTrainedTokenizerBase, Path]:
    """That of the input `model`, or of an adapter that is trained further, and its folder.

    Raises `DataError` where the model cannot take such rows, or its template is not fit for training.
    """
    require_length(read_config(ctx.inputs["model"]), max_length_tokens)
    home = tokenizer_to_train_with(ctx.inputs)
    tokenizer = load_tokenizer(home)
    check_chat_template(tokenizer, str(home))
    return tokenizer, home
